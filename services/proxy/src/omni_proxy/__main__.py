"""`python -m omni_proxy`: settings from the environment, then serve."""

import sys

import uvloop

from omni_common.command import settings_of
from omni_common.errors import OmniError
from omni_proxy.serving import serve
from omni_proxy.settings import Settings


def main() -> None:
    """Exit code 2: the settings are wrong; 1: the service could not start."""
    settings = settings_of(Settings, sys.argv[1:])
    try:
        uvloop.run(serve(settings))
    except (OmniError, OSError) as error:
        sys.exit(f"omni-proxy: {error}")


if __name__ == "__main__":
    main()
