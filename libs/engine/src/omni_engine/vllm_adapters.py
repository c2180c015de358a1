"""LoRA adapters on vLLM: what is read of their files before a start, and what is refused. Imports nothing of vLLM."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_common.errors import InvalidRequest
from omni_engine.tensor_files import parsed, stored_tensors
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
# Parts of names that an adapter and the model's files may set differently.
_WRAPPERS = frozenset({"model", "language_model", "transformer"})
# Files lack a tied head, and vLLM pads both.
_VOCABULARY = frozenset({"lm_head", "embed_tokens"})
# The experts of a layer in one tensor, by what PEFT matches its patterns against.
_STACKED = {".experts.base_layer": ".experts.gate_up_proj", ".experts": ".experts.down_proj"}

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


@dataclass(frozen=True, slots=True)
class _Lora:
    """A layer's shapes: `down` is A (rank, in), `up` is B (out, rank)."""

    down: Shape
    up: Shape

    @property
    def adds(self) -> Shape:
        return self.up[0], self.down[1]


@dataclass(frozen=True, slots=True)
class _Ranks:
    """As PEFT and vLLM read them: the first pattern that ends a layer's name decides."""

    usual: int
    patterns: tuple[tuple[re.Pattern[str], int], ...]

    @property
    def largest(self) -> int:
        return max([self.usual, *(rank for _, rank in self.patterns)])

    def of(self, module: str) -> int:
        for ending, parameter in _STACKED.items():
            if module.endswith(ending):
                module = module.removesuffix(ending) + parameter
                break
        return next((rank for pattern, rank in self.patterns if pattern.match(module)), self.usual)


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
    ranks = _ranks(name, config)
    modules = _modules(name, path / "adapter_model.safetensors")
    _check_ranks(name, modules, ranks)
    _check_layers(name, modules, layers)
    is_expert = {module: ".experts" in module for module in modules}
    lasts = frozenset(module.rpartition(".")[2] for module in modules if not is_expert[module])
    return Adapter(name, number, path.resolve(), ranks.largest, lasts, any(is_expert.values()))


def _config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = parsed((path / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise _refused(name, f"no readable adapter_config.json in {path}: {error}") from None
    if not isinstance(config, dict):
        raise _refused(name, f"{path / 'adapter_config.json'} must be a JSON object")
    return config


def _ranks(name: str, config: Mapping[str, Any]) -> _Ranks:
    given = config.get("rank_pattern") or {}
    if not isinstance(given, dict):
        raise _refused(name, "rank_pattern in adapter_config.json must map layers to ranks")
    for rank in (config.get("r"), *given.values()):
        if type(rank) is not int or not 0 < rank <= RANKS[-1]:  # True is an int, and no rank
            raise _refused(name, f"r in adapter_config.json must be from 1 to {RANKS[-1]}")
    try:
        patterns = tuple((re.compile(rf"(.*\.)?({layers})$"), rank) for layers, rank in given.items())
    except (re.error, OverflowError, RecursionError) as error:
        raise _refused(name, f"rank_pattern in adapter_config.json holds no regular expression: {error}") from None
    return _Ranks(config["r"], patterns)


def _modules(name: str, weights: Path) -> dict[str, _Lora]:
    """The layers of an adapter's file."""
    modules: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    try:
        header = stored_tensors(weights)
    except (OSError, ValueError) as error:
        raise _refused(name, f"{weights} cannot be read: {error}") from None
    for tensor, told in header.items():
        if found := _LORA_WEIGHT.fullmatch(tensor):
            if not told.dtype.startswith(("F", "BF")):
                raise _refused(name, f"{tensor} in {weights.name} is {told.dtype}, and must be of floats")
            if len(told.shape) != 2:
                raise _refused(name, f"{tensor} in {weights.name} has {len(told.shape)} dimensions, and must have two")
            modules[found["module"]][found["side"]] = told.shape
        elif not tensor.endswith("base_layer.weight"):  # the model's own, which PEFT may save too
            raise _refused(
                name, f"{tensor} in {weights.name} is not LoRA of a linear layer, and nothing else is served"
            )
    if not modules:
        raise _refused(name, f"{weights} holds no LoRA weights")
    for module, sides in modules.items():
        if len(sides) < 2:
            raise _refused(name, f"{weights.name} has lora_{next(iter(sides))} alone of {module}")
    return {module: _Lora(sides["A"], sides["B"]) for module, sides in modules.items()}


def _check_ranks(name: str, modules: Mapping[str, _Lora], ranks: _Ranks) -> None:
    """vLLM takes what is in the file, and scales it by the rank of the configuration."""
    for module, lora in modules.items():
        found, rank = lora.down[0], ranks.of(module)
        if lora.up[1] != found:
            raise _refused(name, f"{module} has rank {found} in its lora_A and {lora.up[1]} in its lora_B")
        is_stacked = module.endswith(tuple(_STACKED))  # the experts' ranks lie side by side
        if found < rank or (found % rank if is_stacked else found > rank):
            raise _refused(name, f"{module} has rank {found}, and {rank} by adapter_config.json")


def _check_layers(name: str, modules: Mapping[str, _Lora], layers: Mapping[str, set[Shape]]) -> None:
    """vLLM leaves out layers that it does not know, and copies too small ones into a corner: nothing would fail."""
    for module, lora in modules.items():
        layer = _layer(module)
        if not layers or ".experts" in module or layer in _VOCABULARY:
            continue
        shapes = layers.get(layer)
        if shapes is None:
            raise _refused(name, f"the model has no layer {layer}; is it an adapter of this model?")
        if shapes and lora.adds not in shapes:
            raise _refused(
                name,
                f"{layer} is {_times(lora.adds)} in it and {' or '.join(map(_times, shapes))} in the model; "
                "is it an adapter of this model?",
            )


def _layers_of(model_dir: Path) -> dict[str, set[Shape]]:
    """What the model's files hold by `_layer`, with shapes of plain matrices (outside 'layers.' some are turned)."""
    layers: defaultdict[str, set[Shape]] = defaultdict(set)
    for path in model_dir.glob("*.safetensors"):
        try:
            header = stored_tensors(path)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"model_dir: {path} cannot be read: {error}", field="model_dir") from None
        for tensor, told in header.items():
            module, _, kind = tensor.rpartition(".")
            shapes = layers[_layer(module)]
            if kind == "weight" and told.dtype in _FLOATS and _FROM_LAYER.search(module):
                shapes.add(told.shape)
    return dict(layers)


def _layer(module: str) -> str:
    """Its name from 'layers.' on, else without what it is wrapped in."""
    if within := _FROM_LAYER.search(module):
        return within[0]
    return ".".join(part for part in module.split(".") if part not in _WRAPPERS)


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
