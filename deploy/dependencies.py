"""Print the third-party requirements of our packages, so that an image installs them in a layer of their own.

python3 deploy/dependencies.py proto libs/common services/kvstore
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

OURS = re.compile(r"(?P<name>omni[-_]\w+)(\[(?P<extras>[^]]+)\])?")


def third_party(folders: Iterable[Path]) -> list[str]:
    """What the packages in `folders` declare, less our own packages but with the extras named of them; sorted and
    without repeats."""
    projects = [tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in folders]
    by_name = {project["name"]: project for project in projects}
    declared: set[str] = set()
    for project in projects:
        for requirement in project.get("dependencies", ()):
            ours = OURS.match(requirement)
            if ours is None:
                declared.add(requirement)
                continue
            extras = (ours["extras"] or "").split(",")
            offered = by_name.get(ours["name"], {}).get("optional-dependencies", {})
            declared.update(needed for extra in extras for needed in offered.get(extra.strip(), ()))
    return sorted(declared)


def main() -> None:
    print("\n".join(third_party(map(Path, sys.argv[1:]))))


if __name__ == "__main__":
    main()
