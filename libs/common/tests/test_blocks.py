import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_common.blocks import KEY_BYTES, BlockChain, block_extra, block_keys, root_key

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=200)
media = st.lists(st.tuples(st.text(max_size=4), st.integers(-(2**20), 2**20)), max_size=3)
# Few distinct values, so that equal ones meet.
extras = st.sampled_from([b"", block_extra([("a", 0)]), block_extra([("a", 1)]), block_extra(embeds=b"a")])


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


@given(st.data(), st.integers(1, 4), st.integers(1, 6))
def test_extras_enter_the_key_of_their_block_and_all_later_ones(data, block_size, count):
    root, drawn = root_key("m"), st.lists(extras, min_size=count, max_size=count)
    ids = list(range(block_size * count))
    a, b = data.draw(drawn), data.draw(drawn)
    keys_a, keys_b = block_keys(ids, block_size, root, a), block_keys(ids, block_size, root, b)
    for i in range(count):
        same_key = keys_a[i * KEY_BYTES : (i + 1) * KEY_BYTES] == keys_b[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        assert same_key == (a[: i + 1] == b[: i + 1])


@given(st.data(), tokens, st.integers(1, 8), st.lists(st.integers(0, 200), max_size=5))
def test_extending_in_pieces_takes_the_extras_of_completed_blocks(data, ids, block_size, cuts):
    count = len(ids) // block_size
    given_extras = data.draw(st.lists(extras, min_size=count, max_size=count))
    chain, root = BlockChain(root_key("m"), block_size), root_key("m")
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    for a, b in itertools.pairwise(edges):
        chain.extend(ids[a:b], given_extras[a // block_size : b // block_size])
    assert chain.keys == block_keys(ids, block_size, root, given_extras)


@given(tokens, st.integers(1, 8))
def test_empty_extras_hash_as_none(ids, block_size):
    root = root_key("m")
    assert block_keys(ids, block_size, root, [b""] * (len(ids) // block_size)) == block_keys(ids, block_size, root)


@given(media, st.binary(max_size=40), media, st.binary(max_size=40))
def test_different_contents_have_different_extras(media_a, embeds_a, media_b, embeds_b):
    same = (media_a, embeds_a) == (media_b, embeds_b)
    assert (block_extra(media_a, embeds_a) == block_extra(media_b, embeds_b)) == same
    assert bool(block_extra(media_a, embeds_a)) == bool(media_a or embeds_a)


@pytest.mark.parametrize("count", [1, 3])
def test_extras_for_another_number_of_blocks_are_refused(count):
    chain = BlockChain(root_key("m"), 2)
    with pytest.raises(ValueError, match="2 completed"):
        chain.extend([1, 2, 3, 4, 5], [b"x"] * count)
    assert chain.extend([1, 2]) == block_keys([1, 2], 2, root_key("m"))


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
    extra = block_extra([("img", -3)], b"d")
    assert block_keys([1, 2], 2, root_key("m"), [extra]).hex() == "418e2ef83a580519021000818b19e366"
