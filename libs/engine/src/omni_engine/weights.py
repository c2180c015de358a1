"""Which weights an engine computes with: KV blocks mean something only to another engine with the same ones."""

import hashlib
from pathlib import Path

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_CONFIGURATIONS = frozenset({"config.json", "adapter_config.json"})
_SAMPLE_BYTES = 4096
_SAMPLES, _LEAST_SAMPLES = 1024, 16
_DIGEST_BYTES = 8


def weights_digest(folder: Path) -> str:
    """Digest of a model's or an adapter's folder: its configuration and its weights, 16 hexadecimal digits.

    Of large files samples are read, spread evenly: 4 MiB of a model of up to 64 files, 64 KiB of each file of more.
    Models of one shape differ nearly everywhere. The same weights in other files have another digest.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix in _WEIGHTS or f.name in _CONFIGURATIONS)
    samples = max(_LEAST_SAMPLES, _SAMPLES // max(1, len(files)))
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= samples * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(samples):
                file.seek(number * (size - _SAMPLE_BYTES) // (samples - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
