import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.key_cache import CHUNK_BLOCKS, KeyCache

ROOT = root_key("m")
turns = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400), st.integers(0, 300)), min_size=1, max_size=8)


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).tolist()


@given(turns, st.integers(1, 3), st.sampled_from([0, 3_000, 10_000, 1 << 20]))
def test_same_keys_as_hashing_it_all(asked: list[tuple[int, int, int]], block_size: int, max_bytes: int) -> None:
    """Conversations that share beginnings, in any order, with room for all of them, some, or none."""
    cache = KeyCache(max_bytes)
    total = 0
    for number, (family, shared, own) in enumerate(asked):
        prompt = tokens(family, shared) + tokens(100 + number, own)
        for ids in (prompt, np.array(prompt, np.uint32)):
            assert cache.keys(ids, block_size, ROOT) == block_keys(prompt, block_size, ROOT)
            total += len(prompt) // block_size
        assert cache.bytes <= max_bytes
    assert cache.hashed_blocks + cache.reused_blocks == total


@pytest.mark.parametrize("blocks", [CHUNK_BLOCKS - 1, CHUNK_BLOCKS, CHUNK_BLOCKS + 1, 2 * CHUNK_BLOCKS])
@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_around_the_end_of_a_chunk(blocks: int, spare: int) -> None:
    cache, prompt = KeyCache(1 << 20), tokens(0, 4 * blocks + spare)
    for _ in range(2):
        assert cache.keys(prompt, 4, ROOT) == block_keys(prompt, 4, ROOT)


def test_a_next_turn_hashes_only_its_tail() -> None:
    cache, first = KeyCache(1 << 20), tokens(0, 16 * 1000)
    cache.keys(first, 16, ROOT)
    hashed = cache.hashed_blocks
    cache.keys([*first, *tokens(1, 16 * 20)], 16, ROOT)
    assert cache.hashed_blocks - hashed == 20 + 1000 % CHUNK_BLOCKS
    assert cache.reused_blocks == 1000 // CHUNK_BLOCKS * CHUNK_BLOCKS


def test_roots_and_block_sizes_are_kept_apart() -> None:
    cache, prompt = KeyCache(1 << 20), tokens(0, 16 * CHUNK_BLOCKS)
    for root, block_size in ((ROOT, 16), (root_key("n"), 16), (ROOT, 8), (ROOT, 4)):
        assert cache.keys(prompt, block_size, root) == block_keys(prompt, block_size, root)
    assert cache.reused_blocks == 0


def test_drops_the_oldest_and_tails_first() -> None:
    size = CHUNK_BLOCKS * KEY_BYTES + 256
    cache = KeyCache(4 * size)
    old, new = tokens(0, 3 * CHUNK_BLOCKS), tokens(1, 2 * CHUNK_BLOCKS)
    cache.keys(old, 1, ROOT)
    cache.keys(new, 1, ROOT)
    assert cache.bytes == 4 * size
    cache.keys(old[: 2 * CHUNK_BLOCKS], 1, ROOT)
    assert cache.reused_blocks == 2 * CHUNK_BLOCKS
    cache.keys(old, 1, ROOT)
    assert cache.reused_blocks == 4 * CHUNK_BLOCKS


@pytest.mark.parametrize(("max_bytes", "block_size"), [(-1, 1), (1, 0)])
def test_senseless_sizes_are_refused(max_bytes: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        KeyCache(max_bytes).keys([1], block_size, ROOT)
