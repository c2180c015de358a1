"""vLLM's torch ops for LoRA adapters, for CPUs: rows without an adapter get nothing added. Row 41 of UPSTREAM.md.

Weights are (slots, 1, out, in); `slots_of_rows` names each row's slot, -1 for the model itself. vLLM's own index the
weights by it, so that -1 is the last slot and the model answers with that slot's adapter; and they copy a slot's
weights for every row. These multiply by all slots at once and keep what is each row's.
"""

import importlib

import torch
from torch import Tensor


def shrink(inputs: Tensor, weights: Tensor, output: Tensor, slots_of_rows: Tensor, scaling: float = 1.0) -> None:
    """output[i] = scaling * weights[slot of i] @ inputs[i], zero without a slot."""
    slots, width = len(weights), weights.shape[-2]
    by_slot = inputs.to(output.dtype) @ weights.reshape(slots * width, -1).to(output.dtype).T
    own = by_slot.view(-1, slots, width)[_each(slots_of_rows), slots_of_rows]
    output[:, :width] = own * (scaling * _has_adapter(slots_of_rows))


def expand(inputs: Tensor, weights: Tensor, output: Tensor, slots_of_rows: Tensor, add_inputs: bool = True) -> None:
    """output[i] += weights[slot of i] @ inputs[i]; in place of what was there without `add_inputs`."""
    width = min(weights.shape[-2], output.shape[1])
    expand_slice(inputs, weights, output, slots_of_rows, 0, width, add_inputs)


def expand_slice(
    inputs: Tensor,
    weights: Tensor,
    output: Tensor,
    slots_of_rows: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """`expand` into some of the output's columns."""
    slots, width, rank = len(weights), weights.shape[-2], weights.shape[-1]
    spread = output.new_zeros(len(slots_of_rows), slots, rank)
    spread[_each(slots_of_rows), slots_of_rows] = (inputs * _has_adapter(slots_of_rows)).to(output.dtype)
    by_slot = weights.reshape(slots, width, rank).transpose(1, 2).reshape(slots * rank, width)
    added = (spread.view(-1, slots * rank) @ by_slot.to(output.dtype))[:, :slice_size]
    columns = output[:, slice_offset : slice_offset + slice_size]
    columns.copy_(columns + added if add_inputs else added)


def install() -> None:
    """Make vLLM's CPU wrapper use these; the ops for prompts call those for rows."""
    for module in ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.punica_wrapper.punica_cpu"):
        named = importlib.import_module(module)
        for name, op in {"bgmv_shrink": shrink, "bgmv_expand": expand, "bgmv_expand_slice": expand_slice}.items():
            setattr(named, name, op)


def _each(slots_of_rows: Tensor) -> Tensor:
    return torch.arange(len(slots_of_rows), device=slots_of_rows.device)


def _has_adapter(slots_of_rows: Tensor) -> Tensor:
    return (slots_of_rows >= 0).unsqueeze(1)
