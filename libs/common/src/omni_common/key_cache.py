"""Block keys of prompts that mostly repeat: each turn of a conversation hashes only its new tail block by block.

A prompt is cut into chunks of `CHUNK_BLOCKS` blocks. One chained digest per chunk, over all its tokens at once, tells
whether the same prefix was seen before; its block keys are then taken from memory. Known by content alone: prompts that
share a beginning share its chunks, whoever sends them.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from omni_common.blocks import KEY_BYTES, BlockChain

CHUNK_BLOCKS = 64
_ENTRY_BYTES = 256
"""Of one entry besides its keys: digest, object headers, links of the ordered dictionary."""


class KeyCache:
    """Keeps at most `max_bytes`, dropping what was not asked for the longest, tails before their beginnings."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, not {max_bytes}")
        self._max_bytes = max_bytes
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self.bytes = 0
        self.hashed_blocks = 0
        """Since the start, block by block."""
        self.reused_blocks = 0
        """Since the start, taken from memory."""

    def keys(self, token_ids: Sequence[int] | npt.NDArray[np.uint32], block_size: int, root: bytes) -> bytes:
        """What `block_keys` gives. Arrays of uint32 are read as they are; other sequences are converted first."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        tokens = _as_array(token_ids)
        size = CHUNK_BLOCKS * block_size
        digest = root + block_size.to_bytes(4, "little")
        parts: list[bytes] = []
        seen: list[bytes] = []
        last = root
        for start in range(0, len(tokens) - size + 1, size):
            chunk = tokens[start : start + size]
            digest = xxhash.xxh3_128_digest(digest + chunk.tobytes())
            keys = self._chunks.get(digest)
            if keys is None:
                keys = self._hashed(chunk, block_size, last)
                self._keep(digest, keys)
            else:
                self.reused_blocks += CHUNK_BLOCKS
            parts.append(keys)
            seen.append(digest)
            last = keys[-KEY_BYTES:]
        parts.append(self._hashed(tokens[len(parts) * size :], block_size, last))
        self._use(seen)
        return b"".join(parts)

    def _hashed(self, tokens: npt.NDArray[np.uint32], block_size: int, last: bytes) -> bytes:
        keys = BlockChain(last, block_size).extend(tokens.data)
        self.hashed_blocks += len(keys) // KEY_BYTES
        return keys

    def _keep(self, digest: bytes, keys: bytes) -> None:
        self._chunks[digest] = keys
        self.bytes += _ENTRY_BYTES + len(keys)

    def _use(self, digests: list[bytes]) -> None:
        for digest in reversed(digests):
            self._chunks.move_to_end(digest)
        while self.bytes > self._max_bytes:
            _, keys = self._chunks.popitem(last=False)
            self.bytes -= _ENTRY_BYTES + len(keys)


def _as_array(token_ids: Sequence[int] | npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    if not isinstance(token_ids, np.ndarray):
        token_ids = np.frombuffer(array("I", token_ids), np.uint32)  # a third of the time numpy takes for a list
    return np.ascontiguousarray(token_ids, dtype="<u4")
