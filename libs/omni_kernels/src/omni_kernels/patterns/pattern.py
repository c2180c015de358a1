"""A pattern: which layers keep which KV blocks while decoding, and the file that carries it to the engines.

The scheme is OmniAttn's (Pangu's omni-infer): whole layers are compressed, not heads, so that tensor-parallel ranks
stay in step and multi-head latent attention, with its one latent head, can take part.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Budget:
    """Blocks of a sequence that a layer keeps while decoding: the first `sink_blocks`, the last `recent_blocks`."""

    sink_blocks: int
    recent_blocks: int

    def __post_init__(self) -> None:
        whole("sink_blocks", self.sink_blocks, least=0)
        whole("recent_blocks", self.recent_blocks, least=1)

    @property
    def blocks(self) -> int:
        return self.sink_blocks + self.recent_blocks

    def __str__(self) -> str:
        return f"{self.sink_blocks}+{self.recent_blocks}"


Layer = Budget | None
"""None keeps everything."""


@dataclass(frozen=True, slots=True)
class Found:
    """How a pattern came about, and what it was measured to be worth on which text; for people, not for engines."""

    method: str = ""
    seed: int = 0
    evaluations: int = 0
    questions: int = 0
    accuracy: float | None = None
    perplexity: float | None = None
    full_accuracy: float | None = None
    full_perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """One layer after the other, from the embedding up. `block_size` is in tokens, `token_bytes` is the size of one
    token's keys and values in one layer."""

    model: str
    block_size: int
    token_bytes: int
    layers: tuple[Layer, ...]
    found: Found = field(default_factory=Found)

    def __post_init__(self) -> None:
        whole("block_size", self.block_size, least=1)
        whole("token_bytes", self.token_bytes, least=1)
        if not self.layers:
            refuse("layers", "must name every attention layer of the model", "none")

    @property
    def is_full(self) -> bool:
        return not any(self.layers)

    @property
    def digest(self) -> str:
        """Names what engines must agree on, to exchange KV."""
        return hashlib.sha256(f"{self.block_size} {self}".encode()).hexdigest()[:16]

    def blocks_of(self, layer: Layer, tokens: int) -> int:
        """Blocks that `layer` holds of a decoding sequence of `tokens`."""
        used = -(-tokens // self.block_size)
        return used if layer is None else min(used, layer.blocks)

    def kv_bytes(self, tokens: int) -> int:
        """KV of one decoding sequence of `tokens` over all layers, in bytes of whole blocks."""
        blocks = sum(self.blocks_of(layer, tokens) for layer in self.layers)
        return blocks * self.block_size * self.token_bytes

    def share(self, tokens: int) -> float:
        """KV bytes as a part of what full attention holds, 0 to 1."""
        full = Pattern(self.model, self.block_size, self.token_bytes, (None,) * len(self.layers))
        return self.kv_bytes(tokens) / full.kv_bytes(tokens)

    def __str__(self) -> str:
        return " ".join("full" if layer is None else str(layer) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "block_size": self.block_size,
            "token_bytes": self.token_bytes,
            "layers": [
                {"kind": "full"} if layer is None else {"kind": "sink_recent", **asdict(layer)} for layer in self.layers
            ],
            "found": asdict(self.found),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Pattern":
        """Raises ValueError naming the field that is wrong, missing or unknown."""
        fields = _object("pattern", data, "format", "model", "block_size", "token_bytes", "layers", "found")
        if fields["format"] != FORMAT:
            refuse("format", f"must be {FORMAT}", fields["format"])
        if not isinstance(fields["layers"], list):
            refuse("layers", "must be a list", type(fields["layers"]).__name__)
        if not isinstance(fields["model"], str):
            refuse("model", "must be a string", repr(fields["model"]))
        found = _found(fields["found"])
        layers = tuple(_layer(f"layers[{n}]", layer) for n, layer in enumerate(fields["layers"]))
        return cls(fields["model"], fields["block_size"], fields["token_bytes"], layers, found)


def read(path: Path) -> Pattern:
    """Raises ValueError where there is no readable pattern, naming the file and the field."""
    try:
        return Pattern.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"attention pattern {path}: {error}") from None


def write(pattern: Pattern, path: Path) -> None:
    path.write_text(json.dumps(pattern.to_json(), indent=2) + "\n")


def refuse(name: str, expected: str, came: object) -> NoReturn:
    """Always raises ValueError."""
    raise ValueError(f"{name}: {expected}, not {came}")


def whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        refuse(name, f"must be a whole number of {least} or more", repr(value))


def _object(name: str, data: Any, *fields: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        refuse(name, "must be an object", type(data).__name__)
    if data.keys() != set(fields):
        refuse(name, f"must have the fields {', '.join(fields)}", ", ".join(data) or "none")
    return data


def _found(data: Any) -> Found:
    fields = _object("found", data, *Found.__dataclass_fields__)
    if not isinstance(fields["method"], str):
        refuse("found.method", "must be a string", repr(fields["method"]))
    for name in ("seed", "evaluations", "questions"):
        if type(fields[name]) is not int:
            refuse(f"found.{name}", "must be a whole number", repr(fields[name]))
    for name in ("accuracy", "perplexity", "full_accuracy", "full_perplexity"):
        if type(fields[name]) not in (int, float, type(None)):
            refuse(f"found.{name}", "must be a number or null", repr(fields[name]))
    return Found(**fields)


def _layer(name: str, data: Any) -> Layer:
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "full":
        _object(name, data, "kind")
        return None
    if kind != "sink_recent":
        refuse(f"{name}.kind", "must be full or sink_recent", kind)
    fields = _object(name, data, "kind", "sink_blocks", "recent_blocks")
    try:
        return Budget(fields["sink_blocks"], fields["recent_blocks"])
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
