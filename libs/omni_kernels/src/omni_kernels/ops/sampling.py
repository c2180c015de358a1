"""Choice of the next token: the most likely tokens kept (top-k; top-p, Holtzman et al., 2019), one of them drawn."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import Case, declare
from omni_kernels.checks import has_dims, has_dtype, has_shape, is_contiguous, on_device_of, refuse, wide


def _top_k_top_p(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """`logits` float32 (S, V) with -inf for the tokens that each row's `k` int32 (S,) and `p` float32 (S,) leave out.

    Top-k keeps every logit not below the k-th largest; 0, or V and more, is off. Of what is left, renormalised, top-p
    keeps the fewest most likely tokens whose probabilities sum to at least p, and one in any case; 1 is off. Of equal
    logits at the edge the higher token is kept. A token whose probability float32 cannot hold may be left out.
    Raises ValueError when sizes or dtypes do not match.
    """
    vocabulary = logits.shape[-1]
    ordered, order = wide(logits).sort(dim=-1, stable=True)
    count = k.long().where((k > 0) & (k < vocabulary), vocabulary)
    smallest = ordered.gather(-1, (vocabulary - count).unsqueeze(-1))
    ordered = ordered.masked_fill(ordered < smallest, -torch.inf)
    below = ordered.softmax(-1).cumsum(-1) <= (1 - p).unsqueeze(-1)
    below[:, -1] = False
    return torch.empty_like(ordered).scatter_(-1, order, ordered.masked_fill(below, -torch.inf))


def _sample(logits: Tensor, k: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    """A token int64 (S,) of each row, drawn from the softmax of what top_k_top_p keeps of `logits` float32 (S, V).

    `noise` float32 (S, V) is drawn from the exponential distribution and positive: the token with the largest ratio of
    probability to noise is the one, which is the Gumbel-max trick (Maddison et al., 2014).
    Raises ValueError when sizes or dtypes do not match.
    """
    return (_top_k_top_p(logits, k, p).softmax(-1) / noise).argmax(-1)


def _check(logits: Tensor, k: Tensor, p: Tensor) -> None:
    has_dtype("logits", logits, torch.float32)
    has_dims("logits", logits, 2)
    is_contiguous("logits", logits)
    if logits.shape[1] == 0:
        refuse("logits", "vocabulary must not be empty", tuple(logits.shape))
    for argument, x, dtype in (("k", k, torch.int32), ("p", p, torch.float32)):
        has_dtype(argument, x, dtype)
        has_shape(argument, x, logits.shape[:1])
        is_contiguous(argument, x)
        on_device_of(argument, x, logits)


def _check_sample(logits: Tensor, k: Tensor, p: Tensor, noise: Tensor) -> None:
    _check(logits, k, p)
    has_dtype("noise", noise, torch.float32)
    has_shape("noise", noise, logits.shape)
    is_contiguous("noise", noise)
    on_device_of("noise", noise, logits)


def _fake(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _fake_sample(logits: Tensor, k: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def _choices(where: device) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor], torch.Generator]]:
    generator = torch.Generator().manual_seed(0)
    for label, vocabulary, k, p in (
        ("tiny", 512, (0, 1, 5, 512, 40, 3), (1.0, 0.9, 0.5, 0.7, 0.01, 1.0)),
        ("only p", 512, (0, 0, 0), (0.1, 0.9, 0.99)),
        ("only k", 512, (1, 2, 511), (1.0, 1.0, 1.0)),
        ("all on", 512, (1, 30, 512), (0.5, 0.9, 0.999)),
        ("one row", 512, (20,), (0.8,)),
        ("no rows", 512, (), ()),
        ("a vocabulary of one", 1, (1, 0), (0.5, 1.0)),
        ("deepseek-v3", 129280, (50, 0, 1200), (0.95, 0.6, 0.9)),
        ("qwen3-30b-a3b", 151936, (20, 20), (0.8, 1.0)),
        ("pangu-ultra-moe", 153600, (0, 30), (1.0, 0.7)),
    ):
        logits = (3 if vocabulary < 1000 else 9) * torch.randn(len(k), vocabulary, generator=generator)
        chosen = torch.tensor(k, dtype=torch.int32), torch.tensor(p, dtype=torch.float32)
        yield label, (logits.to(where), chosen[0].to(where), chosen[1].to(where)), generator
    ties = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], device=where)
    edges = torch.tensor([2, 0], dtype=torch.int32, device=where), torch.tensor([1.0, 0.5], device=where)
    yield "equal logits", (ties, *edges), generator


def _samples(where: device) -> Iterator[Case]:
    for label, inputs, _ in _choices(where):
        yield Case(f"top_k_top_p-{label}-float32", inputs, 0, 0)


def _samples_of_sample(where: device) -> Iterator[Case]:
    for label, inputs, generator in _choices(where):
        noise = torch.empty(inputs[0].shape).exponential_(generator=generator)
        yield Case(f"sample-{label}-float32", (*inputs, noise.to(where)), 0, 0)


TOP_K_TOP_P = declare("top_k_top_p", _top_k_top_p, _fake, _check, _samples)
SAMPLE = declare("sample", _sample, _fake_sample, _check_sample, _samples_of_sample)
top_k_top_p = TOP_K_TOP_P.call
sample = SAMPLE.call

OPS = (TOP_K_TOP_P, SAMPLE)
