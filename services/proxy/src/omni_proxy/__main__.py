"""`python -m omni_proxy`"""

import sys

import uvloop

from omni_common.errors import OmniError
from omni_proxy.serving import serve
from omni_proxy.settings import Settings


def main() -> None:
    try:
        settings = Settings.load()
        uvloop.run(serve(settings))
    except (OmniError, OSError) as error:
        sys.exit(f"omni-proxy: {error}")


if __name__ == "__main__":
    main()
