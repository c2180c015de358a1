"""Generate the Python stubs under src/ from the contracts; `--check` says whether they are current."""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(target: Path) -> list[Path]:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` of every contract below `target`."""
    sources = sorted((ROOT / "omni").rglob("*.proto"))
    arguments = ["protoc", f"-I{ROOT}", f"--python_out={target}", f"--pyi_out={target}", f"--grpc_python_out={target}"]
    if protoc.main([*arguments, *map(str, sources)]) != 0:
        raise SystemExit("protoc failed; its message is above")
    for contract in sources:  # protoc writes an empty service module for contracts without one
        stub = target / contract.relative_to(ROOT).parent / f"{contract.stem}_pb2_grpc.py"
        if "service " not in contract.read_text():
            stub.unlink(missing_ok=True)
    return _stubs(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a stub is missing or stale")
    committed = ROOT / "src"
    if not parser.parse_args().check:
        print(f"{len(generate(committed))} stubs written")
        return
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        stale = [p for p in fresh if not _same(Path(scratch) / p, committed / p)]
    extra = [p for p in _stubs(committed) if p not in fresh]
    if stale or extra:
        sys.exit(f"stubs differ from the contracts: {[*map(str, stale), *map(str, extra)]}; run `make proto`")


def _stubs(tree: Path) -> list[Path]:
    return sorted(p.relative_to(tree) for p in tree.rglob("*_pb2*") if p.suffix in (".py", ".pyi"))


def _same(a: Path, b: Path) -> bool:
    return b.exists() and filecmp.cmp(a, b, shallow=False)


if __name__ == "__main__":
    main()
