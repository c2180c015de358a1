"""Checkpoints of safetensors files: what is in them, and writing a quantized copy file by file.

Format: compressed-tensors, `int-quantized`. `<module>.weight` becomes int8 of the same shape, and
`<module>.weight_scale` float32 (out, 1) stands beside it; activations are quantized per token as they come.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import (  # type: ignore[import-untyped]
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omni_kernels.ops.quant import quantized
from omni_kernels.quantize.choice import Choice, Weight

INDEX = "model.safetensors.index.json"
SCALE = "weight_scale"
# Everything a server reads beside the weights.
COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.py")


def read_config(model: Path) -> dict[str, Any]:
    """Raises ValueError where there is no readable config.json."""
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: no readable config.json: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{model / 'config.json'}: must be a JSON object")
    return config


def weights_of(model: Path) -> list[Weight]:
    """All tensors, in the order of the files. Raises ValueError where there are no safetensors files, or the index
    names tensors that are in none of them."""
    weights = [
        Weight(name, tuple(part.get_shape()), part.get_dtype())
        for path in files_of(model)
        for name, part in _slices(path)
    ]
    listed = _listed(model / INDEX)
    if missing := listed.keys() - {weight.name for weight in weights}:
        name = min(missing)
        said = f"{len(missing)} of {len(listed)} tensors are missing, such as {name} ({listed[name]})"
        raise ValueError(f"{model}: {said}")
    return weights


def files_of(model: Path) -> list[Path]:
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model}: no *.safetensors files; convert other formats first")
    return files


def write(model: Path, out: Path, choice: Choice, told: Callable[[str], None] = lambda name: None) -> None:
    """A quantized copy of `model` in `out`; `told` hears of every tensor. Holds one file of weights in memory.

    Raises ValueError where `out` holds something already, or a weight is not finite.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; name a new folder")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with emptied_on_failure(out):
        _write(model, out, choice, told)


@contextmanager
def emptied_on_failure(out: Path) -> Iterator[None]:
    """The files in `out` are deleted where the block fails: nobody shall serve a model that is half there, or wrong."""
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            path.unlink()
        raise


def _write(model: Path, out: Path, choice: Choice, told: Callable[[str], None]) -> None:
    chosen, total = frozenset(choice.quantized), 0
    where: dict[str, str] = {}
    for path in files_of(model):
        tensors = dict(_converted(path, chosen, told))
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        (out / path.name).chmod(0o644)  # written for its owner only; servers run as other users
        where |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    for path in {found for pattern in COPIED for found in model.glob(pattern)}:
        shutil.copy(path, out / path.name)
    if (model / INDEX).exists():
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    config = read_config(model) | {"quantization_config": quantization_config(choice)}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def quantization_config(choice: Choice) -> Mapping[str, Any]:
    """What config.json says of the weights: int8 with a scale per output channel, activations int8 per token."""
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    activations = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    config = QuantizationConfig(
        config_groups={
            "group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
        },
        ignore=list(choice.kept_modules),
        format="int-quantized",
        quantization_status="compressed",
    )
    found: dict[str, Any] = json.loads(config.model_dump_json())
    return found


def _listed(index: Path) -> Mapping[str, str]:
    """The file of each tensor, as the index says; nothing where there is no index."""
    if not index.exists():
        return {}
    try:
        listed: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: names no tensors: {error!r}") from None
    return listed


def _converted(path: Path, chosen: frozenset[str], told: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # a file, not a mapping
            tensor = file.get_tensor(name)
            if name in chosen:
                if not tensor.isfinite().all():
                    raise ValueError(f"{name}: has values that are not finite")
                codes, scale = quantized(tensor.float())
                yield name, codes
                yield f"{name.removesuffix('weight')}{SCALE}", scale.unsqueeze(1)
            else:
                yield name, tensor
            told(name)


def _slices(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_slice(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short: {error}") from None
