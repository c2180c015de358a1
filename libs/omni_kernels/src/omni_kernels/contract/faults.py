"""Ways for an argument to be wrong, and which of them make a call of which op wrong."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Fault = Callable[[Any], Any]


def _last_short(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


def _first_short(x: Tensor) -> Tensor:
    return x[:-1].contiguous()


def _spread(x: Tensor) -> Tensor:
    """The same values with a gap behind each."""
    return torch.stack((x, x), -1)[..., 0]


def _one_beyond(x: Tensor) -> Tensor:
    """The largest value is far beyond what there is."""
    wrong = x.clone()
    wrong.view(-1)[0] = 1_000_000
    return wrong


def _falling(x: Tensor) -> Tensor:
    return x.flip(0).contiguous()


FAULTS: Mapping[str, Fault] = {
    "last dimension short by one": _last_short,
    "first dimension short by one": _first_short,
    "a dimension more": lambda x: x.unsqueeze(0),
    "a dimension fewer": lambda x: x.reshape(-1) if x.ndim > 1 else x[0],
    "no elements": lambda x: x.new_empty((*x.shape[:-1], 0)),
    "gaps between elements": _spread,
    "dtype float64": lambda x: x.double(),
    "dtype float16 and bfloat16 swapped": lambda x: x.to(torch.bfloat16 if x.dtype is torch.float16 else torch.float16),
    "dtype int16": lambda x: x.to(torch.int16),
    "dtype int32 and int64 swapped": lambda x: x.to(torch.int64 if x.dtype is torch.int32 else torch.int32),
    "dtype bool": lambda x: x.to(torch.bool),
    "an id beyond the cache": _one_beyond,
    "in falling order": _falling,
    "a list": lambda x: x.tolist() if isinstance(x, Tensor) else [x],
    "text": lambda x: "7",
    "a tensor": lambda x: torch.tensor([1, 2]),
    "a fraction": lambda x: 1.5,
    "zero": lambda x: 0,
    "negative": lambda x: -1,
    "not a number": lambda x: float("nan"),
    "a million": lambda x: 1_000_000,
    "unknown name": lambda x: "tanh",
    "dtype of integers": lambda x: torch.int32,
    "one more": lambda x: x + 1,
}


def _missing(inputs: tuple[Any, ...], names: Sequence[str]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (), dict(zip(names[1:], inputs[1:], strict=False))


def _unknown(inputs: tuple[Any, ...], names: Sequence[str]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return inputs, {"epsilonn": 1e-6}


def _too_many(inputs: tuple[Any, ...], names: Sequence[str]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (*inputs, *(None for _ in range(len(names) - len(inputs))), 1), {}


def _twice(inputs: tuple[Any, ...], names: Sequence[str]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return inputs, {names[0]: inputs[0]}


SIGNATURE_FAULTS: Mapping[
    str, Callable[[tuple[Any, ...], Sequence[str]], tuple[tuple[Any, ...], Mapping[str, Any]]]
] = {
    "the first argument is missing": _missing,
    "an unknown keyword": _unknown,
    "an argument too many": _too_many,
    "the first argument twice": _twice,
}

_FLOATS = ("dtype float64", "dtype int16", "a list")
_SIZED = ("last dimension short by one", "a dimension more", *_FLOATS)
_SCALE = ("dtype float64", "first dimension short by one", "gaps between elements", "text")
_INDEX = ("dtype int32 and int64 swapped", "a dimension more", "a list")
_GROUPS = ("first dimension short by one", *_INDEX)
_POSITIVE = ("zero", "negative", "not a number", "text", "a tensor")
_COUNT = ("zero", "negative", "a fraction", "text")

_PAGED: Mapping[str, Sequence[str]] = {
    "block_table": ("first dimension short by one", "an id beyond the cache", *_INDEX),
    "query_start": ("first dimension short by one", "in falling order", *_INDEX),
    "seq_lens": ("an id beyond the cache", *_GROUPS),
    "scale": _POSITIVE,
}
_GQA: Mapping[str, Sequence[str]] = {
    "q": _SIZED,
    "key_cache": ("last dimension short by one", "no elements", *_FLOATS),
    "value_cache": ("a dimension fewer", "first dimension short by one", *_FLOATS),
    **_PAGED,
}
_MLA: Mapping[str, Sequence[str]] = {
    "q_latent": _SIZED,
    "q_rope": ("first dimension short by one", *_SIZED),
    "cache": ("last dimension short by one", "a dimension more", *_FLOATS),
    **_PAGED,
}
_INDEXER: Mapping[str, Sequence[str]] = {
    "q": _SIZED,
    "weights": ("first dimension short by one", "gaps between elements", *_SIZED),
    "key_cache": ("last dimension short by one", "a dimension more", *_FLOATS),
    **{name: faults for name, faults in _PAGED.items() if name != "scale"},
    "top_k": _COUNT,
}
_NORM: Mapping[str, Sequence[str]] = {
    "x": ("dtype float64", "dtype int16", "no elements", "a list"),
    "weight": ("dtype float64", "last dimension short by one", "a dimension more"),
    "eps": _POSITIVE,
}
_RESIDUAL = ("dtype float64", "last dimension short by one", "first dimension short by one", "gaps between elements")

# Every fault of an argument here makes the call wrong on all samples that have more than one of everything.
TABLE: Mapping[str, Mapping[str, Sequence[str]]] = {
    "rms_norm": _NORM,
    "add_rms_norm": {**_NORM, "residual": _RESIDUAL},
    "rms_norm_quant": _NORM,
    "add_rms_norm_quant": {**_NORM, "residual": _RESIDUAL},
    "dynamic_quant": {"x": ("dtype float64", "dtype int16", "no elements", "gaps between elements", "a list")},
    "rotary": {
        "x": ("a dimension more", "first dimension short by one", *_FLOATS),
        "cos": ("first dimension short by one", "no elements", "dtype int16", "gaps between elements", "text"),
        "sin": ("last dimension short by one", "first dimension short by one", "dtype float64"),
        "interleaved": ("text", "a tensor"),
    },
    "swiglu": {"gate_up": ("last dimension short by one", "gaps between elements", "no elements", *_FLOATS)},
    "swiglu_quant": {"gate_up": ("last dimension short by one", "gaps between elements", "no elements", *_FLOATS)},
    "dequant_swiglu_quant": {
        "acc": ("last dimension short by one", "dtype float64", "a dimension more"),
        "row_scale": _SCALE,
        "column_scale": ("last dimension short by one", "a dimension fewer", *_SCALE),
        "group_sizes": _GROUPS,
    },
    "top_k_top_p": {
        "logits": ("dtype float64", "dtype int16", "a dimension more", "no elements", "text"),
        "k": _GROUPS,
        "p": ("dtype float64", "first dimension short by one"),
    },
    "sample": {
        "logits": ("dtype float64", "dtype int16", "a dimension more", "no elements"),
        "k": _GROUPS,
        "p": ("dtype float64", "first dimension short by one"),
        "noise": ("dtype float64", "last dimension short by one", "gaps between elements", "a dimension fewer"),
    },
    "speculative_verify": {
        "draft": ("dtype int32 and int64 swapped", "last dimension short by one", "a dimension more"),
        "draft_probs": ("last dimension short by one", "first dimension short by one", "dtype float64"),
        "target_probs": ("first dimension short by one", "dtype float64", "a dimension more", "no elements"),
        "uniform": ("last dimension short by one", "dtype float64", "gaps between elements"),
        "noise": ("last dimension short by one", "dtype float64", "a list"),
    },
    "moe_gate": {
        "logits": ("last dimension short by one", "a dimension more", "gaps between elements", *_FLOATS),
        "bias": ("last dimension short by one", "dtype float64", "a dimension more", "text"),
        "top_k": ("a million", *_COUNT),
        "scoring": ("unknown name", "zero"),
        "num_groups": ("a million", *_COUNT),
        "top_k_groups": ("a million", *_COUNT),
        "renormalize": ("text", "a tensor"),
        "scale": _POSITIVE,
        "replicas": ("first dimension short by one", "dtype float64", "a dimension fewer", "no elements"),
        "num_slots": ("zero", "negative", "a fraction"),
        "token_offset": ("negative", "a fraction", "text"),
        "real_tokens": ("dtype int32 and int64 swapped", "a dimension more", "text"),
    },
    "moe_permute": {
        "x": ("first dimension short by one", "a dimension more", "gaps between elements", "dtype float64"),
        "slots": ("first dimension short by one", "no elements", "dtype float64", *_INDEX),
        "num_slots": _COUNT,
    },
    "moe_combine": {
        "rows": ("first dimension short by one", "dtype float64", "a dimension more", "gaps between elements"),
        "source": _GROUPS,
        "weights": ("first dimension short by one", "dtype float64", "a dimension fewer"),
        "residual": ("last dimension short by one", "first dimension short by one", "dtype float64"),
    },
    "moe_experts": {
        "x": ("last dimension short by one", "first dimension short by one", "gaps between elements", *_FLOATS),
        "gate_up": ("last dimension short by one", "first dimension short by one", "no elements", "dtype float64"),
        "down": ("last dimension short by one", "a dimension fewer", "dtype float64", "gaps between elements"),
        "weights": ("first dimension short by one", "last dimension short by one", "dtype float64"),
        "slots": ("no elements", "dtype float64", *_GROUPS),
    },
    "grouped_matmul": {
        "x": ("last dimension short by one", "a dimension more", "gaps between elements", *_FLOATS),
        "weight": ("first dimension short by one", "a dimension fewer", "dtype float64", "no elements", "a list"),
        "group_sizes": _GROUPS,
    },
    "grouped_matmul_w8a8": {
        "x": ("last dimension short by one", "dtype int16", "gaps between elements"),
        "row_scale": _SCALE,
        "weight": ("last dimension short by one", "first dimension short by one", "dtype int16"),
        "column_scale": ("last dimension short by one", "a dimension fewer", *_SCALE),
        "group_sizes": _GROUPS,
        "out_dtype": ("dtype of integers", "text"),
    },
    "grouped_matmul_w4a8": {
        "x": ("last dimension short by one", "dtype int16", "gaps between elements"),
        "row_scale": _SCALE,
        "weight": ("last dimension short by one", "first dimension short by one", "dtype int16"),
        "group_scale": ("last dimension short by one", "a dimension fewer", *_SCALE),
        "group_sizes": _GROUPS,
        "out_dtype": ("dtype of integers", "text"),
    },
    "paged_attention": _GQA,
    "sink_recent_attention": {
        **_GQA,
        "sink": ("negative", "a fraction", "text"),
        "recent": ("negative", "a fraction", "text"),
    },
    "mla_attention": _MLA,
    "sparse_mla_attention": {
        **_MLA,
        "positions": ("first dimension short by one", "no elements", "an id beyond the cache", *_INDEX),
    },
    "indexer_top_k": _INDEXER,
    "kv_write": {
        "key": ("last dimension short by one", "first dimension short by one", "a dimension fewer", *_FLOATS),
        "value": ("last dimension short by one", "first dimension short by one", *_FLOATS),
        "key_cache": ("last dimension short by one", "a dimension more", "dtype int16"),
        "value_cache": ("first dimension short by one", "a dimension fewer", "dtype float64"),
        "slots": ("an id beyond the cache", *_GROUPS),
    },
    "kv_gather": {
        "cache": ("a list",),
        "blocks": ("an id beyond the cache", "dtype bool", *_INDEX),
    },
    "kv_scatter": {
        "cache": ("last dimension short by one", "dtype float64", "a dimension more"),
        "blocks": ("an id beyond the cache", "dtype bool", *_GROUPS),
        "data": ("last dimension short by one", "first dimension short by one", "dtype float64"),
    },
    "kv_gather_int8": {
        "cache": ("dtype float64", "dtype int16", "no elements", "a dimension fewer"),
        "blocks": ("an id beyond the cache", "dtype bool", *_INDEX),
    },
    "kv_scatter_int8": {
        "cache": ("dtype float64", "dtype int16", "last dimension short by one"),
        "blocks": ("an id beyond the cache", *_GROUPS),
        "data": ("dtype int16", "last dimension short by one", "first dimension short by one"),
        "scale": ("dtype float64", "last dimension short by one", "a dimension fewer"),
    },
}
