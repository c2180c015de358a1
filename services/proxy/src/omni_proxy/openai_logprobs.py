"""Log-probabilities as OpenAI's two APIs write them."""

from collections.abc import Callable, Sequence
from typing import Any

from omni_proxy.detokenize import Detokenizer
from omni_proxy.ports import LogprobRow

TokenText = Callable[[int], tuple[str, bytes]]

# JSON has no infinity; a token that cannot be drawn gets this instead.
_LOWEST = -9999.0


def chat_logprobs(rows: Sequence[LogprobRow], token_text: TokenText) -> dict[str, Any]:
    return {"content": [_chat_entry(row, token_text) for row in rows]}


class CompletionRows:
    """The rows of one choice, as they come. Offsets count characters of its text.

    A token that only goes on with a character begins where that does.
    """

    def __init__(self, token_text: TokenText, detokenizer: Detokenizer) -> None:
        self._token_text = token_text
        self._detokenizer = detokenizer
        self._offset = 0

    def __call__(self, rows: Sequence[LogprobRow]) -> dict[str, Any]:
        result: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for row in rows:
            result["text_offset"].append(self._offset)
            result["token_logprobs"].append(_finite(row.logprobs[0]))
            result["tokens"].append(self._token_text(row.token_ids[0])[0])
            result["top_logprobs"].append(self._best(row))
            self._offset += len(self._detokenizer.push(row.token_ids[:1]))
        return result

    def _best(self, row: LogprobRow) -> dict[str, float]:
        """Of tokens with one text, parts of characters, the sampled or else the likelier one counts."""
        best: dict[str, float] = {}
        for token_id, value in zip(row.token_ids, row.logprobs, strict=True):
            best.setdefault(self._token_text(token_id)[0], _finite(value))
        return best


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
