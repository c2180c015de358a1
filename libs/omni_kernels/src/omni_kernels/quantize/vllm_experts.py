"""Int8 experts for vLLM's CPU platform where its own do not run: without AMX, and with DeepSeek's routing.

vLLM chooses the first class of a list that supports the model and the machine. `install` puts two behind vLLM's own:
vLLM's AMX kernel, which takes weights and choices that any router made and yet refuses all but two routers by name;
and Omni's ops, for CPUs without AMX. Importing this needs vLLM.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8
from vllm.model_executor.layers.fused_moe.oracle import int8 as oracle
from vllm.platforms import current_platform

from omni_kernels.load import load
from omni_kernels.quantize.int8_experts import int8_experts


def install() -> None:
    """Once in each of vLLM's processes, before the model is made; again does nothing."""
    listed = oracle.backend_to_kernel_cls
    if getattr(listed, "omni_added", False):
        return
    oracle.backend_to_kernel_cls = _with_ours(listed)


def _with_ours(listed: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    def backend_to_kernel_cls(backend: Any) -> list[Any]:
        ours = [AmxExpertsInt8, OpExpertsInt8] if backend == oracle.Int8MoeBackend.CPU else []
        return [*listed(backend), *ours]

    backend_to_kernel_cls.omni_added = True  # type: ignore[attr-defined]
    return backend_to_kernel_cls


class AmxExpertsInt8(CPUExpertsInt8):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's kernel, behind any router."""

    @staticmethod
    def _supports_routing_method(*_: Any) -> bool:
        return True


class OpExpertsInt8(CPUExpertsInt8):  # type: ignore[misc]
    """Omni's ops: tokens quantized once and sorted by expert, two grouped int8 products with SwiGLU between."""

    @staticmethod
    def is_supported_config(cls: Any, *args: Any) -> tuple[bool, str | None]:
        """Any size: the ops have none of the AMX kernel's alignments."""
        supported: tuple[bool, str | None] = modular_kernel.FusedMoEExperts.is_supported_config(cls, *args)
        return supported

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cpu())

    @staticmethod
    def _supports_routing_method(*_: Any) -> bool:
        return True

    @staticmethod
    def _supports_parallel_config(parallel: Any) -> bool:
        """Slots of other ranks are not known here: `expert_map` is not looked at."""
        return not parallel.use_ep

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Weights stay as checkpoints have them, int8 (E, out, in)."""
        load("cpu")

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        output.copy_(
            int8_experts(
                hidden_states, w1, self.w1_scale.squeeze(-1), w2, self.w2_scale.squeeze(-1), topk_weights, topk_ids
            )
        )
