"""`python -m omni_prefill`: settings, then the app."""

import sys

import uvloop

from omni_common.command import settings_of
from omni_prefill.app import serve
from omni_prefill.settings import Settings


def main() -> None:
    """Exit code 2: the settings are wrong; 1: the engine could not start or died."""
    settings = settings_of(Settings, sys.argv[1:])
    try:
        raise SystemExit(uvloop.run(serve(settings)))
    except OSError as error:
        sys.exit(f"omni-prefill: {error}")


if __name__ == "__main__":
    main()
