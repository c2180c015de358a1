"""The vLLM plug-in without an engine: the setting, what is registered where, the router, and what status reads."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_kernels.vllm import platform, plugin
from omni_kernels.vllm.parts import PARTS, POSSIBLE, environment, ir_op_priority, parts_of
from omni_kernels.vllm.status import calls_in

# Layers that vllm-ascend registers out of tree, in one release or another.
ASCEND_LAYERS = {
    *("QuickGELU", "SiluAndMul", "SiluAndMulClamp", "RotaryEmbedding", "MRotaryEmbedding", "ApplyRotaryEmb"),
    *("YaRNScalingRotaryEmbedding", "DeepseekScalingRotaryEmbedding", "ColumnParallelLinear", "RowParallelLinear"),
    *("MergedColumnParallelLinear", "QKVParallelLinear", "ReplicatedLinear", "VocabParallelEmbedding"),
    *("ParallelLMHead", "LogitsProcessor", "RMSNorm", "GemmaRMSNorm", "RMSNormGated", "FusedMoE", "SharedFusedMoE"),
    *("MultiHeadLatentAttentionWrapper", "MMEncoderAttention", "Conv3dLayer", "RelPosAttention"),
    *("CustomQwen2Decoder", "GatedDeltaNetAttention", "BailingMoELinearAttention", "MoERunner", "RoutedExperts"),
    *("GateLinear", "UnquantizedFusedMoEMethod"),
}


@pytest.mark.parametrize(
    ("kernels", "where", "parts"),
    [
        ("vllm", "cpu", set()),
        ("omni", "cpu", {"routing"}),
        ("omni", "twin", set(PARTS)),
        ("omni", "ascend", {"norms"}),
        ("omni:attention,norms", "cpu", {"attention", "norms"}),
    ],
)
def test_the_setting_names_parts(kernels: str, where: str, parts: set[str]) -> None:
    assert parts_of(kernels, where) == parts


@pytest.mark.parametrize(
    ("kernels", "where", "names"),
    [
        ("fast", "cpu", "must be vllm, omni or"),
        ("omni:", "cpu", "no part ''"),
        ("omni:norms,norm", "cpu", "no part 'norm'"),
        ("vllm:norms", "cpu", "must be vllm, omni or"),
        ("omni:experts", "ascend", "on ascend the parts are norms, not experts"),
        ("vllm", "twin", "cannot do without experts, routing"),
        ("omni:norms", "twin", "cannot do without experts, routing"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(kernels: str, where: str, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        parts_of(kernels, where)


def test_engines_on_their_own_kernels_are_told_nothing() -> None:
    assert environment("vllm", "cpu") == {}
    assert ir_op_priority(parts_of("vllm", "cpu")) == {}
    assert ir_op_priority(parts_of("omni:routing", "cpu")) == {}


def test_without_the_variables_nothing_is_imported_or_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment("omni", "twin"):
        monkeypatch.delenv(name, raising=False)

    def never(name: str) -> Any:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(plugin.importlib, "import_module", never)
    plugin.register()
    assert platform.register() is None


@pytest.mark.parametrize(("kernels", "where", "is_twin"), [("omni", "twin", True), ("omni", "cpu", False)])
def test_the_twin_comes_by_its_own_setting_only(
    monkeypatch: pytest.MonkeyPatch, kernels: str, where: str, is_twin: bool
) -> None:
    for name, value in environment(kernels, where).items():
        monkeypatch.setenv(name, value)
    assert (platform.register() is not None) == is_twin


# Run in a process of its own: what is registered with vLLM and torch stays for a process's life.
_REGISTER = """
import json, os, sys, torch
from omni_kernels.vllm.parts import environment
os.environ.update(environment(sys.argv[1], sys.argv[2]))
from omni_kernels.vllm.plugin import register
from vllm.platforms import current_platform
from vllm.v1.attention.backends import registry
before = registry.AttentionBackendEnum.CPU_ATTN.get_path()
loaded = []
if sys.argv[2] == "ascend":  # torch_npu is not here; what is registered with vLLM does not depend on it
    current_platform.register_triton_kernel_overrides = lambda: loaded.append("npu")
register()
register()
from vllm.model_executor.custom_op import op_registry_oot
import vllm.ir, vllm.model_executor.layers.fused_moe.layer as moe
seen = {
    "is_oot": current_platform.is_out_of_tree(),
    "layers": sorted(op_registry_oot),
    "norms": "omni" in vllm.ir.ops.rms_norm.impls,
    "router": getattr(moe.create_fused_moe_router, "is_omni", False),
    "attention": registry.AttentionBackendEnum.CPU_ATTN.get_path() != before,
    "custom": registry._ATTN_OVERRIDES.get(registry.AttentionBackendEnum.CUSTOM),
}
if sys.argv[2] == "cpu":
    current_platform.register_triton_kernel_overrides()
    from omni_kernels.vllm.usage import calls
    norm = vllm.ir.ops.fused_add_rms_norm
    def layer(x, w):
        return norm(x, x, w, 1e-6)[0] * 2
    x, w = torch.randn(4, 64), torch.rand(64)
    with norm.set_priority(["omni", "native"]), vllm.ir.enable_torch_wrap(False):
        eager = layer(x, w)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        seen["same"] = all(torch.allclose(compiled(x, w), eager) for _ in range(3))
    seen["calls"] = calls()
print(json.dumps(seen))
"""


def registered(kernels: str, where: str) -> dict[str, Any]:
    """What a process has registered that vLLM has called our plug-in in."""
    pytest.importorskip("vllm")
    run = subprocess.run(
        [sys.executable, "-c", _REGISTER, kernels, where], capture_output=True, text=True, timeout=110, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seen: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return seen


def test_beside_vllm_ascend_no_name_of_its_own_is_taken() -> None:
    seen = registered("omni", "ascend")
    assert seen["norms"]
    assert not ASCEND_LAYERS & set(seen["layers"])
    assert not seen["router"]
    assert not seen["attention"]
    assert seen["custom"] is None


def test_each_part_is_registered_once_and_its_calls_are_counted_from_graphs_too() -> None:
    seen = registered("omni:norms,routing,attention", "cpu")
    assert not seen["is_oot"]
    assert seen["layers"] == []
    assert seen["norms"]
    assert seen["router"]
    assert seen["attention"]
    assert seen["same"]
    (calls,) = seen["calls"]["add_rms_norm"].values()
    assert calls == 4
    assert set(seen["calls"]) == {"add_rms_norm"}


def test_only_ascend_lacks_what_vllm_ascend_brings() -> None:
    assert POSSIBLE["cpu"] == POSSIBLE["twin"] == set(PARTS)
    assert POSSIBLE["ascend"] == {"norms"}


NAMES = st.text("abcdefgh_", min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(0, 2**50), min_size=1), max_size=4))
def test_status_reads_what_the_workers_metrics_say(calls: dict[str, dict[str, int]]) -> None:
    metrics = pytest.importorskip("omni_engine.hosting.metrics")
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    registry.register(metrics.KernelsCollector(lambda: calls))
    assert calls_in(prometheus.generate_latest(registry).decode()) == calls


class Stack:
    """Stands for what the command line gives its extensions: where a stack's workers tell their metrics."""

    def __init__(self, pages: dict[str, Path]) -> None:
        self._pages = pages

    def metrics_of(self, services: Sequence[str], **stack: Any) -> dict[str, str]:
        assert set(services) == {"prefill", "decode"}
        return {name: page.as_uri() for name, page in self._pages.items()}


def shown(stack: Stack, *options: str) -> str:
    testing = pytest.importorskip("typer.testing")
    commands = pytest.importorskip("omni_kernels.commands")
    result = testing.CliRunner().invoke(commands.app, ["status", *options], obj=stack)
    assert result.exit_code == 0, result.output
    output: str = result.output
    return output


def test_status_shows_each_worker(tmp_path: Path) -> None:
    page = tmp_path / "metrics"
    page.write_text('omni_engine_kernel_calls_total{backend="cpu",op="moe_gate"} 1.2e+04\nother 3\n')
    idle = tmp_path / "idle"
    idle.write_text("other 3\n")
    stack = Stack({"decode-0": page, "prefill-0": idle, "prefill-1": tmp_path / "gone"})
    lines = {line.split()[0]: line for line in shown(stack).splitlines()}
    assert lines["decode-0"].split() == ["decode-0", "moe_gate", "cpu", "12,000"]
    assert "vLLM's kernels" in lines["prefill-0"]
    assert "does not answer" in lines["prefill-1"]
    workers = json.loads(shown(stack, "--json"))["workers"]
    assert workers == {"decode-0": {"moe_gate": {"cpu": 12000}}, "prefill-0": {}, "prefill-1": None}


def test_without_a_stack_status_says_what_can_be_loaded_and_why_not() -> None:
    found = json.loads(shown(Stack({}), "--json"))["backends"]
    assert found["cpu"]["kernels"] > 0
    if "reason" in found["npu"]:
        assert "install torch_npu" in found["npu"]["reason"]
    assert "cpu" in shown(Stack({}))
