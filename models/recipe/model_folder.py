"""A model's folder on disk, written alike by every recipe: configurations, weights, the tiny model's tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

TINY_MOE = Path(__file__).parents[1] / "tiny-moe"
WEIGHTS = "model.safetensors"


def write_json(path: Path, content: object, *, indent: int | None = 2, sort_keys: bool = False) -> None:
    path.write_text(json.dumps(content, indent=indent, sort_keys=sort_keys, ensure_ascii=False) + "\n")


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})
    let_others_read(folder)


def let_others_read(folder: Path) -> None:
    """Weights are saved for their owner only; servers run as other users."""
    (folder / WEIGHTS).chmod(0o644)


def token_ids(tiny: Path = TINY_MOE) -> dict[str, int]:
    """What a configuration says of the tiny model's tokens."""
    config = json.loads((tiny / "config.json").read_text())
    return {name: config[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}


def copy_tokenizer(folder: Path, tiny: Path = TINY_MOE) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, folder / name)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Of a recipe without training; `doc` is its module's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights")
    return parser
