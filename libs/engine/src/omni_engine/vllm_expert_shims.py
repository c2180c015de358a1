"""What expert parallelism with movable experts needs changed inside vLLM's processes; `UPSTREAM.md` books each.

Every change is idempotent and made once per process by the plug-in, where the engine's environment asks for it.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from omni_engine.vllm_expert_state import ExpertState

_GOLDEN = 2654435769  # 2^32 / golden ratio: successive multiples fall evenly over the 32-bit range


def install() -> None:
    """Make the changes in this process."""
    _take_over_load_model(importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner)
    if not importlib.import_module("vllm.platforms").current_platform.is_cpu():
        return
    _take_over_load_model(importlib.import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner)
    fused_moe = "vllm.model_executor.layers.fused_moe"
    router: Any = importlib.import_module(f"{fused_moe}.router.base_router")
    router.eplb_map_to_physical_and_record = map_and_record
    experts = importlib.import_module(f"{fused_moe}.experts.cpu_moe")
    experts.X86CPUUnquantizedExperts._supports_current_device = staticmethod(lambda: False)
    _compute_local_pairs(experts.CPUUnquantizedExperts)
    communicator = importlib.import_module("vllm.distributed.device_communicators.cpu_communicator").CpuCommunicator
    communicator.all_gatherv = all_gatherv
    communicator.reduce_scatterv = reduce_scatterv


def map_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logical expert ids (tokens, top k) to physical ones; counts what the first `num_unpadded_tokens` tokens chose.

    Tokens spread over an expert's copies by their index, the same on every rank that sees them.
    """
    experts = topk_ids.long()
    index = torch.arange(len(experts)).unsqueeze(1) + experts
    fraction = (index * _GOLDEN) & 0xFFFFFFFF
    copy = (fraction * logical_replica_count[experts]) >> 32
    physical = logical_to_physical_map[experts, copy]
    if record_enabled:
        counted = physical if num_unpadded_tokens is None else physical[: int(num_unpadded_tokens)]
        expert_load_view += torch.bincount(counted.flatten(), minlength=len(expert_load_view))
    return physical.to(topk_ids.dtype)


def all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Rows of every rank, one after another; `sizes` are the ranks' row counts. Several tensors go as one message."""
    tensors = [input_] if isinstance(input_, torch.Tensor) else input_
    counts = sizes or [len(tensors[0])] * self.world_size
    rows = [tensor.contiguous().view(len(tensor), -1).view(torch.uint8) for tensor in tensors]
    message = torch.zeros(max(counts), sum(row.shape[1] for row in rows), dtype=torch.uint8)
    message[: len(rows[0])] = torch.cat(rows, dim=1)
    blocks = [torch.empty_like(message) for _ in counts]
    dist.all_gather(blocks, message, group=self.device_group)
    kept = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
    parts = torch.split(kept, [row.shape[1] for row in rows], dim=1)
    joined = [
        part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for part, tensor in zip(parts, tensors, strict=True)
    ]
    return joined[0] if isinstance(input_, torch.Tensor) else joined


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """This rank's rows of the sum over ranks."""
    counts = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=self.device_group)
    first = sum(counts[: self.rank_in_group])
    return total[first : first + counts[self.rank_in_group]]


def _take_over_load_model(runner_class: Any) -> None:
    """After a model is loaded, let our state stand where vLLM's load balancer stands in the runner."""
    original: Callable[..., None] = runner_class.load_model
    if getattr(original, "is_omni", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not self.parallel_config.enable_eplb:
            return
        interfaces = importlib.import_module("vllm.model_executor.models.interfaces")
        groups = importlib.import_module("vllm.distributed.parallel_state")
        self._moe_model = interfaces.get_mixture_of_experts_model(self.model)
        is_split = self._moe_model.moe_layers[0].moe_config.is_sequence_parallel
        self.eplb_state = ExpertState(
            self._moe_model,
            groups.get_eplb_group(),
            self.parallel_config.data_parallel_size,
            num_batches=max(1, self.parallel_config.num_ubatches),
            counts=is_split or groups.get_tp_group().rank_in_group == 0,
            runner=self,
        )

    load_model.is_omni = True  # type: ignore[attr-defined]
    runner_class.load_model = load_model


def _compute_local_pairs(experts_class: Any) -> None:
    """Compute only the (token, expert) pairs whose expert lies on this rank: the CPU kernels ignore `expert_map`."""
    original: Callable[..., None] = experts_class.apply
    if getattr(original, "is_omni", False):
        return

    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *rest: Any,
        **named: Any,
    ) -> None:
        def compute(out: torch.Tensor, states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
            original(
                self, out, states, w1, w2, weights, ids, activation, global_num_experts, expert_map, *rest, **named
            )

        if expert_map is None:
            compute(output, hidden_states, topk_weights, topk_ids)
            return
        slots = expert_map[topk_ids.long()]
        token, choice = torch.nonzero(slots >= 0, as_tuple=True)
        if len(token) == 0:
            output.zero_()
            return
        partial = hidden_states.new_empty(len(token), hidden_states.shape[1])
        weights = topk_weights[token, choice].unsqueeze(1)
        compute(partial, hidden_states[token], weights, slots[token, choice].unsqueeze(1).to(topk_ids.dtype))
        total = torch.zeros(output.shape, dtype=torch.float32)
        output.copy_(total.index_add_(0, token, partial.float()))

    apply.is_omni = True  # type: ignore[attr-defined]
    experts_class.apply = apply
