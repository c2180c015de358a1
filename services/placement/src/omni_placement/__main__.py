"""`python -m omni_placement`: settings from the environment, then serve."""

import sys

import uvloop

from omni_common.errors import OmniError
from omni_placement.app import serve
from omni_placement.settings import Settings


def main() -> None:
    try:
        uvloop.run(serve(Settings.load()))
    except (OmniError, OSError) as error:
        sys.exit(f"omni-placement: {error}")


if __name__ == "__main__":
    main()
