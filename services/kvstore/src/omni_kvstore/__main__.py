"""`python -m omni_kvstore [migrate]`: settings from the environment, then serve, or bring old keys to this schema."""

import sys

import uvloop

from omni_common.errors import InvalidRequest, OmniError
from omni_kvstore.app import migrated, serve
from omni_kvstore.settings import Settings

_USAGE = "usage: omni-kvstore [migrate]; settings are OMNI_KVSTORE_* variables"


def main() -> None:
    try:
        match sys.argv[1:]:
            case []:
                uvloop.run(serve(Settings.load()))
            case ["migrate"]:
                print(uvloop.run(migrated(Settings.load())))
            case ["-h" | "--help"]:
                print(_USAGE)
            case _:
                raise InvalidRequest(_USAGE)
    except (OmniError, OSError) as error:
        sys.exit(f"omni-kvstore: {error}")


if __name__ == "__main__":
    main()
