"""Log-probabilities as OpenAI's two APIs write them."""

from collections.abc import Callable, Sequence
from typing import Any

from omni_proxy.ports import LogprobRow

TokenText = Callable[[int], tuple[str, bytes]]

# JSON has no infinity; a token that cannot be drawn gets this instead.
_LOWEST = -9999.0


def chat_logprobs(rows: Sequence[LogprobRow], token_text: TokenText) -> dict[str, Any]:
    return {"content": [_chat_entry(row, token_text) for row in rows]}


def completion_logprobs(rows: Sequence[LogprobRow], token_text: TokenText, offset: int) -> dict[str, Any]:
    """`offset` is the length of the text before these tokens."""
    result: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for row in rows:
        text, _ = token_text(row.token_ids[0])
        result["text_offset"].append(offset)
        result["token_logprobs"].append(_finite(row.logprobs[0]))
        result["tokens"].append(text)
        pairs = zip(row.token_ids, row.logprobs, strict=True)
        result["top_logprobs"].append({token_text(i)[0]: _finite(value) for i, value in pairs})
        offset += len(text)
    return result


def _chat_entry(row: LogprobRow, token_text: TokenText) -> dict[str, Any]:
    pairs = list(zip(row.token_ids, row.logprobs, strict=True))
    entry = _entry(*pairs[0], token_text)
    entry["top_logprobs"] = [_entry(token_id, value, token_text) for token_id, value in pairs[1:]]
    return entry


def _entry(token_id: int, value: float, token_text: TokenText) -> dict[str, Any]:
    text, data = token_text(token_id)
    return {"token": text, "logprob": _finite(value), "bytes": list(data)}


def _finite(value: float) -> float:
    return max(value, _LOWEST)
