"""What a safetensors file holds, by its header alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`start` and `end` are places in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name. Raises OSError, or ValueError where it is no such file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = 8 + length
        held = path.stat().st_size - begin
        if held < 0:
            raise ValueError("it is cut short, or no safetensors file")
        header = parsed(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header must be a JSON object")
    header.pop("__metadata__", None)
    return {name: _tensor(name, told, begin, held) for name, told in header.items()}


def parsed(text: str | bytes) -> Any:
    """JSON. Raises ValueError, also where it is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def _tensor(name: str, told: Any, begin: int, held: int) -> StoredTensor:
    """`held` bytes follow the header, from `begin` on."""
    match told:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            if not 0 <= start <= end <= held:
                raise ValueError(f"{name} lies beyond its end")
            if all(type(size) is int and size >= 0 for size in shape):
                return StoredTensor(dtype, tuple(shape), begin + start, begin + end)
    raise ValueError(f"its header tells no dtype, shape and data_offsets of {name}")
