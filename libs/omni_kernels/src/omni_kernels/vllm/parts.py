"""Which parts of an engine run on Omni's ops, as the setting `kernels` says it. Imports neither torch nor vLLM.

    vllm                    vLLM's own kernels only
    omni                    the parts that are usual on the platform
    omni:norms,routing      these and no others

An engine's processes are told by two environment variables; without them the plug-ins do nothing.
"""

from collections.abc import Mapping

KERNELS_VARIABLE = "OMNI_ENGINE_KERNELS"
PLATFORM_VARIABLE = "OMNI_ENGINE_PLATFORM"

PARTS: Mapping[str, str] = {
    "norms": "RMS norms, alone and with the residual added",
    "routing": "experts chosen, replicas chosen, loads counted, in one op",
    "experts": "tokens permuted, expert matrices multiplied, results combined",
    "attention": "paged attention and KV writes; latent attention on decode",
    "rotary": "rotary embeddings",
    "activation": "SwiGLU of dense layers",
}

BACKENDS: Mapping[str, str] = {"cpu": "cpu", "twin": "cpu", "cuda": "triton", "ascend": "npu"}
"""Of each platform, the backend whose kernels it runs."""

POSSIBLE: Mapping[str, frozenset[str]] = {
    "cpu": frozenset(PARTS),
    "twin": frozenset(PARTS),
    "cuda": frozenset({"norms", "routing"}),
    # vllm-ascend brings its own expert layers, attention backends and out-of-tree layers under the names we would take.
    "ascend": frozenset({"norms"}),
}
USUAL: Mapping[str, frozenset[str]] = {
    **POSSIBLE,
    # The other parts are slower than vLLM's CPU kernels, and norms than what torch.compile makes of vLLM's.
    "cpu": frozenset({"routing"}),
}
# vLLM has no kernels of its own for an out-of-tree platform.
_NEEDED: Mapping[str, frozenset[str]] = {"twin": frozenset({"routing", "experts"})}


def parts_of(kernels: str, platform: str) -> frozenset[str]:
    """The parts that run on Omni's ops.

    Raises:
        ValueError: `kernels` is not of the form above, or the platform cannot run a part, or not without one.
    """
    name, colon, listed = kernels.partition(":")
    if kernels == "vllm":
        chosen: frozenset[str] = frozenset()
    elif kernels == "omni":
        chosen = USUAL[platform]
    elif name == "omni" and colon:
        chosen = frozenset(listed.split(","))
    else:
        raise ValueError(f"kernels: must be vllm, omni or omni:<part>,<part>, not {kernels!r}")
    if unknown := chosen - PARTS.keys():
        raise ValueError(f"kernels: no part {', '.join(sorted(unknown))!r}; there are {', '.join(PARTS)}")
    if impossible := chosen - POSSIBLE[platform]:
        possible = ", ".join(part for part in PARTS if part in POSSIBLE[platform])
        raise ValueError(f"kernels: on {platform} the parts are {possible}, not {', '.join(sorted(impossible))}")
    if missing := _NEEDED.get(platform, frozenset()) - chosen:
        raise ValueError(f"kernels: platform {platform} cannot do without {', '.join(sorted(missing))}")
    return chosen


def environment(kernels: str, platform: str) -> dict[str, str]:
    """What an engine's processes need in their environment; empty where they run on vLLM's kernels."""
    if not (parts := parts_of(kernels, platform)):
        return {}
    return {KERNELS_VARIABLE: ",".join(part for part in PARTS if part in parts), PLATFORM_VARIABLE: platform}


def ir_op_priority(parts: frozenset[str]) -> dict[str, list[str]]:
    """vLLM's engine argument of that name."""
    if "norms" not in parts:
        return {}
    return {"rms_norm": ["omni", "native"], "fused_add_rms_norm": ["omni", "native"]}
