"""Block keys: chained 128-bit hashes over fixed runs of token ids. The only definition.

    root    = xxh3_128(len, model, len, adapter, len, salt)
    key[0]  = xxh3_128(root   + tokens[0 : B])          tokens as little-endian uint32
    key[i]  = xxh3_128(key[i-1] + tokens[iB : (i+1)B] + extra[i])

A key names the whole prefix up to its block's end, so equal keys mean equal prefixes of the same model,
adapter and salt. `extra` is what a block depends on besides its tokens (`block_extra`); plain text has none.
Keys are routing hints: an engine checks its own cache, so a collision costs time only.
They are independent of any engine's hash function and seed.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

KEY_BYTES = 16
SPAN_BLOCKS = 1024
"""A prompt's blocks are filed in spans of this many, each named by the key of its first block."""


def root_key(model: str, adapter: str = "", salt: str = "") -> bytes:
    """Key of the empty prefix; isolates models, adapters and salts from each other."""
    digest = xxhash.xxh3_128()
    for part in (model, adapter, salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.digest()


def block_extra(media: Iterable[tuple[str, int]] = (), embeds: bytes = b"") -> bytes:
    """What one block depends on besides its token ids; empty for plain text.

    `media` are the items (images, audio) whose placeholder tokens lie in the block, in order: an identifier of the
    content, and where the item starts relative to the block's first token, negative where it started earlier.
    `embeds` is a digest of the embeddings that stand in for the block's tokens.
    """
    parts = []
    for identifier, offset in media:
        encoded = identifier.encode()
        parts += [b"m", len(encoded).to_bytes(4, "little"), encoded, offset.to_bytes(8, "little", signed=True)]
    if embeds:
        parts += [b"e", embeds]
    return b"".join(parts)


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

    def extend(self, token_ids: Sequence[int], extras: Sequence[bytes] = ()) -> bytes:
        """Append tokens; returns the keys of the blocks they completed.

        `extras` has one entry for each of those blocks, or none at all where all are plain.
        Raises ValueError for any other number; nothing is appended then.
        """
        data = self._tail + np.asarray(token_ids, dtype="<u4").tobytes()
        size, last = self._block_bytes, self._last
        full = len(data) - len(data) % size
        if extras and len(extras) != full // size:
            raise ValueError(f"{len(extras)} extras for {full // size} completed blocks")
        start = len(self._keys)
        for index, offset in enumerate(range(0, full, size)):
            block = data[offset : offset + size]
            last = xxhash.xxh3_128_digest(last + block + extras[index] if extras else last + block)
            self._keys += last
        self._last, self._tail = last, data[full:]
        return bytes(self._keys[start:])


def block_keys(token_ids: Sequence[int], block_size: int, root: bytes, extras: Sequence[bytes] = ()) -> bytes:
    """Keys of the full blocks of `token_ids`, `KEY_BYTES` each; `extras` as for `BlockChain.extend`."""
    return BlockChain(root, block_size).extend(token_ids, extras)
