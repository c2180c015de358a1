"""`python -m omni_prefill`: settings, then the app."""

import sys

import uvloop

from omni_common.errors import InvalidRequest
from omni_prefill.app import serve
from omni_prefill.settings import Settings


def main() -> None:
    """Exit code 2: the settings are wrong; 1: the engine could not start or died."""
    try:
        settings = Settings.load()
    except InvalidRequest as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(uvloop.run(serve(settings)))


if __name__ == "__main__":
    main()
