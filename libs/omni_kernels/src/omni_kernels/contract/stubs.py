"""Stubs the linker wants, so that the real torch_npu wheel imports on a machine without CANN. For tests only.

Holds symbol names that `readelf` finds in the wheel and nothing else of it. Every function fails, so
`torch.npu.is_available()` stays False and each use of a device raises.
"""

import re
import subprocess
import zipfile
from collections.abc import Iterable
from pathlib import Path

# ACL_ERROR_INVALID_PARAM of the CANN headers; functions that return a pointer return a null one instead.
FAILURE = 100000
POINTERS = frozenset(
    {"aclrtGetSocName", "aclGetRecentErrMsg", "aclCreateTensorDesc", "aclCreateDataBuffer", "aclopCreateAttr"}
)
TOOLS = ("gcc", "readelf")
_NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")


def install(file: Path, site: Path) -> None:
    """Unpack the wheel `file` into the folder `site`, which nothing but the check's own process may import from."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(site)


def build(site: Path, torch_libraries: Path, target: Path) -> tuple[str, ...]:
    """Write one shared library into `target` for each that the wheel in `site` needs and nobody here has.

    Returns their names. Raises CalledProcessError when readelf or gcc fails.
    """
    binaries = sorted(site.rglob("*.so*"))
    present = {path.name for path in binaries} | {path.name for path in torch_libraries.iterdir()} | _system()
    needed = {name for path in binaries for name in _NEEDED.findall(_readelf("-d", path))} - present
    defined: set[str] = set()
    undefined: set[str] = set()
    for path in [*binaries, *torch_libraries.glob("*.so*")]:
        for name, is_undefined in _symbols(path):
            (undefined if is_undefined and path in binaries else defined).add(name)
    missing = sorted(name for name in undefined - defined if not name.startswith("Py"))
    target.mkdir(parents=True, exist_ok=True)
    for library in sorted(needed):
        # One library holds every symbol; the loader only wants the others to exist.
        source = _source(missing) if library == "libascendcl.so" else ""
        _link(source, library, target)
    return tuple(sorted(needed))


def _source(symbols: Iterable[str]) -> str:
    lines = []
    for number, symbol in enumerate(symbols):
        kind, value = ("void *", "0") if symbol in POINTERS else ("int ", str(FAILURE))
        lines.append(f'{kind}stub{number}(void) __asm__("{symbol}");\n{kind}stub{number}(void) {{ return {value}; }}')
    return "\n".join(lines)


def _link(source: str, library: str, target: Path) -> None:
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{library}", "-o", str(target / library)]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)


def _symbols(path: Path) -> Iterable[tuple[str, bool]]:
    """Global dynamic symbols: name, and whether it is undefined. Versioned ones belong to the system's libraries."""
    for line in _readelf("--dyn-syms", path).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[4] in ("GLOBAL", "WEAK"):
            undefined = fields[6] == "UND"
            if undefined and ("@" in fields[7] or fields[4] == "WEAK"):
                continue
            yield fields[7].split("@")[0], undefined


def _readelf(what: str, path: Path) -> str:
    return subprocess.run(["readelf", what, "-W", str(path)], capture_output=True, text=True, check=True).stdout


def _system() -> set[str]:
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    return {line.split()[0] for line in listed.splitlines()[1:] if line.strip()}
