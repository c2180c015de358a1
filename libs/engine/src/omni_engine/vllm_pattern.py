"""An attention pattern: what it asks of vLLM, and which models and settings it is refused with. Imports no vLLM."""

from collections.abc import Mapping
from typing import Any

from omni_common.errors import InvalidRequest
from omni_engine.vllm_settings import VllmSettings
from omni_kernels.patterns.pattern import Pattern, read

FIELD = "vllm.attention_pattern"
# Where the pattern lies in vLLM's `additional_config`, and its digest in a pull's parameters.
KEY = "omni_attention_pattern"
SINCE = (0, 32)
_CPU_BLOCK_TOKENS = 32


def read_pattern(settings: VllmSettings, config: Mapping[str, Any]) -> Pattern | None:
    """The pattern of an engine; None for one that keeps everything.

    Raises:
        InvalidRequest: no readable pattern, or not one for the model of this config.json and these settings.
    """
    if settings.attention_pattern is None:
        return None
    try:
        pattern = read(settings.attention_pattern)
    except ValueError as error:
        raise InvalidRequest(str(error), field=FIELD) from None
    for problem in (_of_settings(settings, pattern), _of_model(config, pattern)):
        if problem:
            raise InvalidRequest(f"attention_pattern: {problem}", field=FIELD)
    return pattern


def _of_settings(settings: VllmSettings, pattern: Pattern) -> str:
    if settings.platform != "cpu":
        return f"it runs on vLLM's CPU platform only, not on {settings.platform}"
    if settings.block_size not in (None, pattern.block_size):
        return f"found for blocks of {pattern.block_size} tokens; block_size is {settings.block_size}"
    if pattern.block_size % _CPU_BLOCK_TOKENS:
        return f"blocks of {pattern.block_size} tokens; the CPU attention kernel takes multiples of {_CPU_BLOCK_TOKENS}"
    if settings.speculative and settings.speculative.method != "ngram":
        return "a prediction layer's drafts are not made under it; use speculative ngram"
    if settings.kernels != "vllm":
        return f"its layers keep vLLM's own attention; kernels is {settings.kernels!r}"
    if settings.data_parallel_size > 1:
        return "not with data_parallel_size"
    return ""


def _of_model(config: Mapping[str, Any], pattern: Pattern) -> str:
    shape = config.get("text_config", config)
    layers = shape.get("num_hidden_layers")
    if layers != len(pattern.layers):
        return f"it has {len(pattern.layers)} layers, the model has {layers}"
    if shape.get("kv_lora_rank"):
        return (
            "layers of multi-head latent attention cannot take part on CPU: vLLM's builder for them sorts a step's "
            "rows into prefill and decode, and the last token of a prompt is a row of its own here"
        )
    if shape.get("use_sliding_window") or (
        shape.get("layer_types") and set(shape["layer_types"]) != {"full_attention"}
    ):
        return "only models whose layers all are of full attention can take part"
    return ""


def arguments(pattern: Pattern) -> dict[str, Any]:
    """vLLM engine arguments besides the KV connector's."""
    return {
        "block_size": pattern.block_size,
        "worker_cls": "omni_kernels.vllm.omni_attn.worker.CpuPatternWorker",
        "additional_config": {KEY: pattern.to_json()},
    }


def connector(pattern: Pattern, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What changes of the NIXL connector's configuration, whose extra configuration is `extra`."""
    return {
        "kv_connector": "SinkRecentNixlConnector",
        "kv_connector_module_path": "omni_engine.vllm_nixl_pattern",
        "kv_connector_extra_config": {**extra, KEY: pattern.digest},
    }


def require_known_vllm() -> None:
    """Raises InvalidRequest on a vLLM without the registry that the pattern's blocks are managed by."""
    import vllm

    if tuple(map(int, vllm.__version__.split(".")[:2])) < SINCE:
        raise InvalidRequest(f"attention_pattern needs vLLM 0.32; this is {vllm.__version__}", field=FIELD)


def groups_of_prefix(metadata: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """vLLM's groups of layers, those of the pattern named for what they are to a prefix: all blocks are needed."""
    return [group | {"kind": "full_attention"} if group["kind"] == "unknown" else group for group in metadata]
