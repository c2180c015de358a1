"""Print the third-party requirements of our packages, so that an image installs them in a layer of their own.

python3 deploy/dependencies.py proto libs/common services/kvstore
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path


def third_party(folders: Iterable[Path]) -> list[str]:
    """What the packages in `folders` declare, less our own packages, sorted and without repeats."""
    declared: set[str] = set()
    for folder in folders:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        declared.update(project.get("dependencies", ()))
    return sorted(requirement for requirement in declared if not re.match(r"omni[-_]", requirement))


def main() -> None:
    print("\n".join(third_party(map(Path, sys.argv[1:]))))


if __name__ == "__main__":
    main()
