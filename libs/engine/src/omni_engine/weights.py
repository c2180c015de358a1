"""Which weights an engine computes with: KV blocks mean something only to another engine with the same ones."""

import hashlib
import os
from contextlib import ExitStack
from io import RawIOBase
from pathlib import Path

from omni_engine.tensor_files import stored_tensors

_CONFIGURATIONS = ("config.json", "adapter_config.json")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf")
_SAMPLE_BYTES = 4096
_WHOLE_BYTES = 64 << 10
"""Of what is not larger all is read: norms, scales, biases, and the tensors of small models."""
_STRIDE_BYTES = 32 << 20
_DIGEST_BYTES = 8


def weights_digest(folder: Path) -> str:
    """Digest of a model's or an adapter's folder, 16 hexadecimal digits: of its configuration and of its weights.

    Of every tensor the name, type, shape and samples are taken, whatever file it lies in; of large tensors 4 KiB here
    and there, so that a change of single rows of one may go unseen. Files of another format than safetensors count
    only where there are none of that, each as one tensor.

    Raises:
        OSError: a file cannot be read.
        ValueError: a safetensors file is none; the message names it.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in _CONFIGURATIONS:
        if (folder / name).is_file():
            digest.update(b"%s\0%s\0" % (name.encode(), (folder / name).read_bytes()))
    tensors = sorted(_tensors(folder))
    with ExitStack() as opened:
        files = {path: opened.enter_context(path.open("rb", buffering=0)) for path in {path for _, path, *_ in tensors}}
        for told, path, start, end in tensors:
            digest.update(b"%s\0%d\0" % (told, end - start))
            for sample in _samples(files[path], start, end):
                digest.update(sample)
    return digest.hexdigest()


def _tensors(folder: Path) -> list[tuple[bytes, Path, int, int]]:
    """What they are called and are, and where they lie."""
    files = [path for path in folder.iterdir() if path.is_file()]
    found = []
    for path in (path for path in files if path.suffix == ".safetensors"):
        try:
            tensors = stored_tensors(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name, tensor in tensors.items():
            told = f"{name}\0{tensor.dtype}\0{tensor.shape}"
            found.append((told.encode(errors="surrogatepass"), path, tensor.start, tensor.end))
    others = (path for path in files if path.suffix in _OTHER_FORMATS)
    return found or [(os.fsencode(path.name), path, 0, path.stat().st_size) for path in others]


def _samples(file: RawIOBase, start: int, end: int) -> list[bytes]:
    size = end - start
    if size <= _WHOLE_BYTES:
        return [_read(file, start, size)]
    count = 2 + size // _STRIDE_BYTES
    places = [start + number * (size - _SAMPLE_BYTES) // (count - 1) for number in range(count)]
    return [_read(file, place, _SAMPLE_BYTES) for place in places]


def _read(file: RawIOBase, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size) or b""
