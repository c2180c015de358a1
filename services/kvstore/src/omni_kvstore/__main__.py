"""`python -m omni_kvstore`: settings from the environment, then serve."""

import sys

import uvloop

from omni_common.errors import OmniError
from omni_kvstore.app import serve
from omni_kvstore.settings import Settings


def main() -> None:
    try:
        uvloop.run(serve(Settings.load()))
    except (OmniError, OSError) as error:
        sys.exit(f"omni-kvstore: {error}")


if __name__ == "__main__":
    main()
