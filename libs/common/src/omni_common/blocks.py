"""Block keys: chained 128-bit hashes over fixed runs of token ids. The only definition.

    root    = xxh3_128(len, model, len, adapter, len, salt)
    key[0]  = xxh3_128(root   + tokens[0 : B])          tokens as little-endian uint32
    key[i]  = xxh3_128(key[i-1] + tokens[iB : (i+1)B])

A key names the whole prefix up to its block's end, so equal keys mean equal prefixes of the same model,
adapter and salt. Keys are routing hints: an engine checks its own cache, so a collision costs time only.
They are independent of any engine's hash function and seed.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

KEY_BYTES = 16


def root_key(model: str, adapter: str = "", salt: str = "") -> bytes:
    """Key of the empty prefix; isolates models, adapters and salts from each other."""
    digest = xxhash.xxh3_128()
    for part in (model, adapter, salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.digest()


class BlockChain:
    """Keys of one growing token sequence; extending hashes only the new tail."""

    def __init__(self, root: bytes, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self._block_bytes = 4 * block_size
        self._last = root
        self._tail = b""
        self._keys = bytearray()

    @property
    def keys(self) -> bytes:
        """Keys of all full blocks, `KEY_BYTES` each, in order."""
        return bytes(self._keys)

    def __len__(self) -> int:
        return len(self._keys) // KEY_BYTES

    def extend(self, token_ids: Sequence[int]) -> bytes:
        """Append tokens; returns the keys of the blocks they completed."""
        data = self._tail + np.asarray(token_ids, dtype="<u4").tobytes()
        size, last = self._block_bytes, self._last
        full = len(data) - len(data) % size
        start = len(self._keys)
        for offset in range(0, full, size):
            last = xxhash.xxh3_128_digest(last + data[offset : offset + size])
            self._keys += last
        self._last, self._tail = last, data[full:]
        return bytes(self._keys[start:])


def block_keys(token_ids: Sequence[int], block_size: int, root: bytes) -> bytes:
    """Keys of the full blocks of `token_ids`, `KEY_BYTES` each."""
    return BlockChain(root, block_size).extend(token_ids)
