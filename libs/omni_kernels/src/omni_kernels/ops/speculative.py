"""Verification of drafted tokens (Leviathan et al., 2023; Chen et al., 2023): the target's distribution is kept."""

from collections.abc import Iterator

import torch
from torch import Tensor, device

from omni_kernels.case import Case, declare
from omni_kernels.checks import has_dims, has_dtype, has_shape, is_contiguous, on_device_of, refuse


def _speculative_verify(
    draft: Tensor, draft_probs: Tensor | None, target_probs: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """(tokens int64 (S, N + 1), accepted int32 (S,)): the accepted drafts of each sequence and one token more.

    `draft` int64 (S, N) holds each sequence's drafted tokens, -1 after the last. `draft_probs` float32 (S, N, V) is
    what they were drawn from, None where they were chosen without a draw. `target_probs` float32 (S, N + 1, V) is what
    the model gives at their places and after the last. A draft is accepted with probability target / draft, by
    `uniform` float32 (S, N) in [0, 1). The first refused one is replaced by a draw from the part of the target above
    the draft; after the last accepted one follows a draw from the target; both by `noise` float32 (S, V), exponential
    and positive, as `sample` does. -1 fills the rest. Whatever the draft, the tokens are distributed as the target is.
    Raises ValueError when sizes or dtypes do not match.
    """
    drafted = (draft >= 0).cumprod(-1)
    token = draft.clamp(min=0).unsqueeze(-1)
    wanted = target_probs[:, :-1].gather(-1, token).squeeze(-1)
    offered = torch.ones_like(uniform) if draft_probs is None else draft_probs.gather(-1, token).squeeze(-1)
    accepted = (drafted * (uniform * offered < wanted)).cumprod(-1).sum(-1)

    sequence = torch.arange(draft.shape[0], device=draft.device)
    target = target_probs[sequence, accepted]
    left = target
    if draft.shape[1]:
        place = accepted.clamp(max=draft.shape[1] - 1)
        refused = (accepted < drafted.sum(-1)).unsqueeze(-1)
        if draft_probs is None:
            above = target.scatter(-1, token[sequence, place], 0.0)
        else:
            above = (target - draft_probs[sequence, place]).clamp(min=0)
        left = above.where(refused & above.any(-1, keepdim=True), target)
    last = (left / noise).argmax(-1)

    places = torch.arange(draft.shape[1] + 1, device=draft.device)
    tokens = torch.nn.functional.pad(draft, (0, 1)).where(places < accepted.unsqueeze(-1), -1)
    return tokens.scatter(-1, accepted.unsqueeze(-1), last.unsqueeze(-1)), accepted.int()


def _check(draft: Tensor, draft_probs: Tensor | None, target_probs: Tensor, uniform: Tensor, noise: Tensor) -> None:
    has_dtype("draft", draft, torch.int64)
    has_dims("draft", draft, 2)
    is_contiguous("draft", draft)
    sequences, drafts = draft.shape
    has_shape("target_probs", target_probs, (sequences, drafts + 1, -1))
    vocabulary = target_probs.shape[2]
    if not vocabulary:
        refuse("target_probs", "vocabulary must not be empty", tuple(target_probs.shape))
    if draft_probs is not None:
        has_shape("draft_probs", draft_probs, (sequences, drafts, vocabulary))
    has_shape("uniform", uniform, draft.shape)
    has_shape("noise", noise, (sequences, vocabulary))
    floats = {"draft_probs": draft_probs, "target_probs": target_probs, "uniform": uniform, "noise": noise}
    for argument, x in floats.items():
        if x is not None:
            has_dtype(argument, x, torch.float32)
            is_contiguous(argument, x)
            on_device_of(argument, x, draft)


def _fake(
    draft: Tensor, draft_probs: Tensor | None, target_probs: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    sequences, drafts = draft.shape
    return draft.new_empty((sequences, drafts + 1)), draft.new_empty((sequences,), dtype=torch.int32)


def _samples(where: device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for label, sequences, drafts, vocabulary, sharpness in (
        ("tiny", 16, 3, 64, 1.0),
        ("mtp of deepseek-v3", 4, 1, 129280, 1.0),
        ("qwen3-30b-a3b", 2, 2, 151936, 1.0),
        ("one-hot target", 8, 4, 32, 1e4),
        ("no sequences", 0, 3, 16, 1.0),
        ("no drafts", 3, 0, 16, 1.0),
    ):
        target = (sharpness * torch.randn(sequences, drafts + 1, vocabulary, generator=generator)).softmax(-1)
        probs = (target[:, :-1] + torch.rand(sequences, drafts, vocabulary, generator=generator) / vocabulary) / 2
        probs /= probs.sum(-1, keepdim=True)
        draft = (probs / torch.empty(probs.shape).exponential_(generator=generator)).argmax(-1)
        uniform = torch.rand(sequences, drafts, generator=generator)
        noise = torch.empty(sequences, vocabulary).exponential_(generator=generator)
        if drafts > 1:
            draft[::3, 1:] = -1
        for name, offered in (("drawn", probs), ("chosen", None)):
            inputs = (draft, offered, target, uniform, noise)
            moved = tuple(None if x is None else x.to(where) for x in inputs)
            yield Case(f"speculative_verify-{label}-{name}-int64", moved, 0, 0)


SPECULATIVE_VERIFY = declare("speculative_verify", _speculative_verify, _fake, _check, _samples)
speculative_verify = SPECULATIVE_VERIFY.call

OPS = (SPECULATIVE_VERIFY,)
