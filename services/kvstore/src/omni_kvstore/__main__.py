"""`python -m omni_kvstore [migrate]`: settings from the environment, then serve, or bring old keys to this schema."""

import sys

import uvloop

from omni_common.command import settings_of
from omni_common.errors import OmniError
from omni_kvstore.app import migrated, serve
from omni_kvstore.settings import Settings


def main() -> None:
    """Exit code 2: the settings are wrong; 1: the service could not start."""
    is_migration = sys.argv[1:] == ["migrate"]
    settings = settings_of(Settings, [] if is_migration else sys.argv[1:], usage="[migrate]")
    try:
        if is_migration:
            print(uvloop.run(migrated(settings)))
        else:
            uvloop.run(serve(settings))
    except (OmniError, OSError) as error:
        sys.exit(f"omni-kvstore: {error}")


if __name__ == "__main__":
    main()
