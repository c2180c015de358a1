import itertools

from hypothesis import given
from hypothesis import strategies as st

from omni_common.blocks import KEY_BYTES, BlockChain, block_keys, root_key

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=200)


@given(tokens, st.integers(1, 17), st.lists(st.integers(0, 200), max_size=5))
def test_extending_in_pieces_gives_the_same_keys(ids: list[int], block_size: int, cuts: list[int]) -> None:
    chain = BlockChain(root_key("m"), block_size)
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    grown = b"".join(chain.extend(ids[a:b]) for a, b in itertools.pairwise(edges))
    assert grown == chain.keys == block_keys(ids, block_size, root_key("m"))
    assert len(grown) == KEY_BYTES * (len(ids) // block_size)


@given(tokens, tokens, st.integers(1, 8))
def test_equal_keys_mean_equal_prefixes(a: list[int], b: list[int], block_size: int) -> None:
    root = root_key("m")
    keys_a, keys_b = block_keys(a, block_size, root), block_keys(b, block_size, root)
    for i in range(min(len(keys_a), len(keys_b)) // KEY_BYTES):
        end = (i + 1) * block_size
        same_key = keys_a[i * KEY_BYTES : (i + 1) * KEY_BYTES] == keys_b[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        assert same_key == (a[:end] == b[:end])


def test_model_adapter_and_salt_do_not_share_keys() -> None:
    roots = {root_key("m"), root_key("m", "a"), root_key("m", "", "a"), root_key("ma"), root_key("", "m")}
    assert len(roots) == 5


def test_keys_are_stable_across_releases() -> None:
    """Persisted indexes and mixed-version fleets depend on these bytes."""
    assert root_key("m").hex() == "8c5a71550290274ac5a9cafde90a4202"
    assert (
        block_keys([1, 2, 3, 4], 2, root_key("m")).hex()
        == "2497281377e576d44d969f84623210b57ec6d3a3586e051a3f2fcebe925d9d3d"
    )
