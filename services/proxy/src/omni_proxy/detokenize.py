"""Token ids to text, one at a time, joining to exactly what decoding all at once gives.

Byte-level and byte-fallback vocabularies are a table of bytes per token id and an incremental UTF-8 decoder;
`tokenizers.DecodeStream` cannot flush what it holds back. Other decoders re-decode a short window.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_BYTES = 64
_MAX_WINDOW = 64


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete; a split character waits for its rest."""

    def flush(self) -> str:
        """What waits, with U+FFFD for characters that never became whole."""


class ByteLevelDetokenizer:
    """`table[id]` is the token's bytes, empty for tokens that are not shown."""

    __slots__ = ("_decode", "_table")

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        if len(token_ids) == 1:
            return self._decode(table[token_ids[0]]) if token_ids[0] < len(table) else ""
        return self._decode(b"".join([table[i] for i in token_ids if i < len(table)]))

    def flush(self) -> str:
        return self._decode(b"", True)


class ByteFallbackDetokenizer:
    """`table[id]` is text, or the byte of a byte token.

    A run of byte tokens shows as text if all of it is valid UTF-8 and as one U+FFFD per byte if not, so a run is
    held until it ends; one longer than `MAX_HELD_BYTES` is decided in parts.
    """

    __slots__ = ("_run", "_started", "_strips_first_space", "_table")

    def __init__(self, table: Sequence[str | int], strips_first_space: bool) -> None:
        self._table = table
        self._run = bytearray()
        self._strips_first_space = strips_first_space
        self._started = False

    def push(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        for token_id in token_ids:
            piece = self._table[token_id] if token_id < len(self._table) else ""
            if isinstance(piece, int):
                self._run.append(piece)
                if len(self._run) >= MAX_HELD_BYTES:
                    parts.append(self._decided_part())
            elif piece:
                parts.append(self._ended_run() + piece)
        return self._joined(parts)

    def flush(self) -> str:
        return self._joined([self._ended_run()])

    def _joined(self, parts: list[str]) -> str:
        text = "".join(parts)
        if text and not self._started:
            self._started = True
            if self._strips_first_space and text.startswith(" "):
                return text[1:]
        return text

    def _ended_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _decided_part(self) -> str:
        """The run but for a character that may not be whole yet."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(bytes(self._run))
        self._run = bytearray(decoder.getstate()[0])
        return text


class WindowDetokenizer:
    """Any decoder: the text that a window of recent tokens gained. `decode` maps ids to text."""

    __slots__ = ("_decode", "_ids", "_shown")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids.extend(token_ids)
        before = self._decode(self._ids[: self._shown])
        after = self._decode(self._ids)
        if after.endswith(_REPLACEMENT) and len(self._ids) - self._shown < _MAX_WINDOW:
            return ""
        if len(self._ids) > _MAX_WINDOW:
            del self._ids[: -_MAX_WINDOW // 4]
        self._shown = len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        before = self._decode(self._ids[: self._shown])
        after = self._decode(self._ids)
        self._shown = len(self._ids)
        return after[len(before) :]
