"""Choice of the next token on Ascend. `speculative_verify` has no call in torch_npu and runs as its meaning."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from omni_kernels.ops.sampling import TOP_K_TOP_P

MAX_K = 1024
"""Of npu_top_k_top_p."""


def _top_k_top_p(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """Fused where top-k is on in every row and within the call's limit, which waits for `k`; else the meaning."""
    if logits.shape[0]:
        low, high = (int(edge) for edge in torch.aminmax(k))
        if low > 0 and high <= min(MAX_K, logits.shape[1]):
            kept: Tensor = torch_npu.npu_top_k_top_p(logits, p, k)
            return kept
    return TOP_K_TOP_P.meaning(logits, k, p)


def _sample(logits: Tensor, k: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    return (_top_k_top_p(logits, k, p).softmax(-1) / noise).argmax(-1)


KERNELS: Mapping[str, Callable[..., Any]] = {"top_k_top_p": _top_k_top_p, "sample": _sample}
