"""Corrections of vLLM's CPU platform against what they correct. Imports vLLM, starts no engine."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from omni_engine import vllm_cpu_fixes
from omni_engine.vllm_cpu_fixes import install

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def rotary() -> Any:
    """DeepSeek's rotary embedding: 64 values, interleaved."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        import torch

        parameters = {"rope_type": "default", "rope_theta": 10000}
        return get_rope(64, 512, is_neox_style=False, rope_parameters=parameters, dtype=torch.float32)


def test_queries_of_three_dimensions_are_rotated_right(rotary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_cpu)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(9, 4, 192, generator=generator), torch.randn(9, 576, generator=generator)
    positions = torch.arange(9)

    def rotated() -> Any:
        return rotary.forward_cpu(positions, query.clone()[..., 128:], key.clone()[:, 512:].unsqueeze(1))

    wanted = rotary.forward_native(positions, query[..., 128:].clone(), key[:, 512:].unsqueeze(1).clone())
    assert (rotated()[0] - wanted[0]).abs().max() > 0.1, "vLLM's op is right: the fix can go"
    install("latent_rotary")
    install("latent_rotary")
    for found, right in zip(rotated(), wanted, strict=True):
        assert torch.allclose(found, right, atol=1e-5)
    flat = query[..., 128:].reshape(9, 256)
    pair = rotary.forward_cpu(positions, flat.clone(), flat.clone())
    right = rotary.forward_native(positions, flat.clone(), flat.clone())
    assert torch.allclose(pair[0], right[0], atol=1e-5), "two dimensions go through vLLM's op as before"


def test_experts_are_found_for_any_router_with_or_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8
    from vllm.model_executor.layers.fused_moe.oracle import int8

    monkeypatch.setattr(int8, "backend_to_kernel_cls", int8.backend_to_kernel_cls)
    install("int8_experts")
    install("int8_experts")
    listed = int8.backend_to_kernel_cls(int8.Int8MoeBackend.CPU)
    assert [cls.__name__ for cls in listed[-2:]] == ["AmxExpertsInt8", "OpExpertsInt8"]
    assert listed.index(CPUExpertsInt8) < len(listed) - 2, "vLLM's own come first"
    for cls in listed[-2:]:
        assert cls._supports_routing_method(RoutingMethodType.DeepSeekV3, None, None)
    for has_amx in (True, False):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        runs = [cls.__name__ for cls in listed if cls._supports_current_device()]
        assert runs[-1] == "OpExpertsInt8"
        assert ("AmxExpertsInt8" in runs) is has_amx


@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
def test_drafted_tokens_get_their_requests_sampling(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    import torch
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample import rejection_sampler

    values = torch.tensor([3, 0, 7]).to(getattr(torch, dtype))
    ends, wanted = torch.tensor([2, 3, 6], dtype=torch.int32), [3, 3, 1, 7, 7, 7]
    output = torch.full((6,), -5).to(values.dtype)
    cpu_triton_utils._expand_kernel_impl(output, values, ends, 0, 1)
    assert (output.tolist() == wanted) is (dtype == "int64"), "vLLM writes other dtypes: the fix can go"
    for name in ("expand_batch_to_tokens", "apply_sampling_constraints"):
        monkeypatch.setattr(rejection_sampler, name, getattr(rejection_sampler, name))
    install("draft_sampling")
    found = rejection_sampler.expand_batch_to_tokens(values, ends, 6, 0, 1)
    assert found.tolist() == wanted
    assert found.dtype == values.dtype
    assert rejection_sampler.expand_batch_to_tokens(values, ends, 6).tolist() == [3, 3, 0, 7, 7, 7]


def test_top_k_in_a_step_without_drafts_does_not_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    with pytest.raises(RuntimeError, match="max"):
        apply_top_k_top_p(torch.empty(0, 8), torch.empty(0, dtype=torch.int32), None)
    for name in ("expand_batch_to_tokens", "apply_sampling_constraints"):
        monkeypatch.setattr(rejection_sampler, name, getattr(rejection_sampler, name))
    install("draft_sampling")
    install("draft_sampling")

    class Sampled:
        all_greedy, temperature, top_k, top_p = False, torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), None

    constrain = rejection_sampler.apply_sampling_constraints
    assert constrain(torch.empty(0, 8), torch.tensor([0], dtype=torch.int32), Sampled()).shape == (0, 8)
    found = constrain(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1], dtype=torch.int32), Sampled())
    assert found.isfinite().tolist() == [[False, True, False]]


def test_unknown_fixes_are_refused() -> None:
    with pytest.raises(KeyError, match="rotery"):
        install("rotery")


@pytest.mark.parametrize(("nodes", "expected"), [("0\n", True), ("0-1\n", False), ("0,2\n", False), (None, False)])
def test_memory_stays_in_place_where_it_can_be_in_one_place_only(
    nodes: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "has_memory"
    if nodes is not None:
        listed.write_text(nodes)
    monkeypatch.setattr(vllm_cpu_fixes, "_MEMORY_NODES", listed)
    assert vllm_cpu_fixes.has_one_memory_node() is expected


def test_the_workers_own_call_migrates_nothing() -> None:
    from vllm.v1.worker import cpu_worker

    install("memory_in_place")
    try:
        assert cpu_worker.torch.ops._C.init_cpu_memory_env([0]) is None
        assert not hasattr(cpu_worker.torch.ops._C.init_cpu_memory_env, "default"), "still vLLM's op"
    finally:
        del cpu_worker.torch.ops._C.init_cpu_memory_env


def test_who_waits_for_a_message_leaves_the_core_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    upstream = SpinCondition.__init__.__defaults__
    assert upstream == (1,), "vLLM spins for another time, or has other defaults"
    monkeypatch.setattr(SpinCondition.__init__, "__defaults__", upstream)
    install("short_spin")
    context = zmq.Context()
    try:
        reader = SpinCondition(True, context, f"ipc://{tmp_path}/told")
        assert reader.busy_loop_s < 0.01
    finally:
        context.destroy(linger=0)
