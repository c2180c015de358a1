"""LoRA adapters on vLLM: what is read of their files before a start, and what is refused. Imports nothing of vLLM."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_common.errors import InvalidRequest
from omni_engine.vllm_settings import VllmSettings

# Ranks that vLLM makes room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# With latent attention vLLM multiplies by this layer's weights elsewhere and does not call it: nothing would be added.
_LATENT = "kv_b_proj"
# What changes an adapter's meaning and vLLM does not compute.
_UNSUPPORTED = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication")
_FLOATS = frozenset({"F32", "F16", "BF16"})
_LORA_WEIGHT = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FROM_LAYER = re.compile(r"layers\.\d+\..+")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """`modules` are the layers it changes, by their last name; `number` is vLLM's name of it."""

    name: str
    number: int
    path: Path
    rank: int
    modules: frozenset[str]
    has_experts: bool


def read_adapters(
    adapters: Mapping[str, Path], settings: VllmSettings, model_dir: Path, config: Mapping[str, Any]
) -> tuple[Adapter, ...]:
    """Sorted by name; `config` is the model's config.json.

    Raises InvalidRequest for one that cannot be read, is not for this model, or has what vLLM cannot compute.
    """
    if not adapters:
        return ()
    layers = _layers_of(model_dir)
    read = tuple(_read(name, number, adapters[name], layers) for number, name in enumerate(sorted(adapters), 1))
    for adapter in read:
        _check_use(adapter, settings, config)
    return read


def arguments(adapters: Sequence[Adapter], slots: int) -> dict[str, Any]:
    """vLLM's engine arguments; every adapter stays in the host's memory."""
    return {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": len(adapters),
        "max_lora_rank": next(rank for rank in RANKS if rank >= max(adapter.rank for adapter in adapters)),
        "lora_target_modules": _targets(adapters),
    }


def _targets(adapters: Iterable[Adapter]) -> list[str]:
    """vLLM wraps the layers so named and those made of them, and no others."""
    named = {module for adapter in adapters for module in adapter.modules}
    experts = {"experts"} if any(adapter.has_experts for adapter in adapters) else set[str]()
    return sorted(named | experts)


def _read(name: str, number: int, path: Path, layers: Mapping[str, set[Shape]]) -> Adapter:
    config = _config(name, path)
    if unsupported := [feature for feature in _UNSUPPORTED if config.get(feature)]:
        raise _refused(name, f"vLLM does not support {' and '.join(unsupported)}")
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none":
        raise _refused(name, "only LoRA without biases is served (peft_type LORA, bias none in adapter_config.json)")
    rank = _rank(name, config)
    modules = _modules(name, path / "adapter_model.safetensors")
    _check_layers(name, modules, layers)
    is_expert = {module: ".experts" in module for module in modules}
    lasts = frozenset(module.rpartition(".")[2] for module in modules if not is_expert[module])
    return Adapter(name, number, path.resolve(), rank, lasts, any(is_expert.values()))


def _config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise _refused(name, f"no readable adapter_config.json in {path}: {error}") from None
    if not isinstance(config, dict):
        raise _refused(name, f"{path / 'adapter_config.json'} must be a JSON object")
    return config


def _rank(name: str, config: Mapping[str, Any]) -> int:
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    known = [rank for rank in ranks if isinstance(rank, int) and 0 < rank <= RANKS[-1]]
    if len(known) < len(ranks):
        raise _refused(name, f"r in adapter_config.json must be from 1 to {RANKS[-1]}")
    return max(known)


def _modules(name: str, weights: Path) -> dict[str, dict[str, Shape]]:
    """The layers of an adapter's file, with the shapes of their A (rank, in) and B (out, rank)."""
    modules: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    try:
        header = _header(weights)
    except (OSError, ValueError) as error:
        raise _refused(name, f"{weights} cannot be read: {error}") from None
    for tensor, told in header.items():
        if found := _LORA_WEIGHT.fullmatch(tensor):
            modules[found["module"]][found["side"]] = tuple(told["shape"])
        elif not tensor.endswith("base_layer.weight"):  # the model's own, which PEFT may save too
            raise _refused(
                name, f"{tensor} in {weights.name} is not LoRA of a linear layer, and nothing else is served"
            )
    if not modules:
        raise _refused(name, f"{weights} holds no LoRA weights")
    return dict(modules)


def _check_layers(name: str, modules: Mapping[str, Mapping[str, Shape]], layers: Mapping[str, set[Shape]]) -> None:
    """vLLM leaves out layers that it does not know, and copies too small ones into a corner: nothing would fail."""
    for module, sides in modules.items():
        within = _FROM_LAYER.search(module)
        if within is None or not layers or ".experts" in module:
            continue
        shapes = layers.get(within[0])
        if shapes is None:
            raise _refused(name, f"the model has no layer {within[0]}; is it an adapter of this model?")
        if shapes and sides.keys() == {"A", "B"} and (sides["B"][0], sides["A"][1]) not in shapes:
            raise _refused(
                name,
                f"{within[0]} is {sides['B'][0]} x {sides['A'][1]} in it and {' or '.join(map(_times, shapes))} in "
                "the model; is it an adapter of this model?",
            )


def _layers_of(model_dir: Path) -> dict[str, set[Shape]]:
    """What the model's files hold by the name from 'layers.' on, with the shapes of plain matrices."""
    layers: defaultdict[str, set[Shape]] = defaultdict(set)
    for path in model_dir.glob("*.safetensors"):
        try:
            header = _header(path)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"model_dir: {path} cannot be read: {error}", field="model_dir") from None
        for tensor, told in header.items():
            if within := _FROM_LAYER.search(tensor):
                shapes = layers[within[0].rpartition(".")[0]]
                if tensor.endswith(".weight") and told["dtype"] in _FLOATS:
                    shapes.add(tuple(told["shape"]))
    return dict(layers)


def _header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name -> dtype and shape."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it is cut short, or no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def _check_use(adapter: Adapter, settings: VllmSettings, config: Mapping[str, Any]) -> None:
    if adapter.has_experts and settings.on_cpu:
        raise _refused(adapter.name, "it has weights for experts, and vLLM has no such kernels for CPUs")
    if adapter.has_experts and settings.expert_parallel:
        raise _refused(adapter.name, "it has weights for experts, which would not move with them (expert_parallel)")
    if config.get("kv_lora_rank") and _LATENT in adapter.modules:
        raise _refused(adapter.name, f"it changes {_LATENT}, whose weights latent attention reads without adapters")


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _refused(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"adapters: {name!r}: {why}", field="adapters")
