import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from engine_model import BLOCK, CacheModel, Prompt

from omni_common.blocks import KEY_BYTES, SPAN_BLOCKS, block_extra, block_keys, root_key
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.ports import BlocksCleared, BlocksRemoved, BlocksStored, Medium

SIZE = 4
ABC = Prompt((1, 2, 3, 4, 5, 6))
_EXTRAS = st.sampled_from([b"", block_extra([("a", 0)]), block_extra([("b", 1)]), block_extra(embeds=b"e")])


@st.composite
def prompts(draw):
    """Few distinct tokens, so that prompts share prefixes and blocks."""
    count = draw(st.integers(1, 5))
    tokens = draw(st.lists(st.integers(0, 1), min_size=count * BLOCK, max_size=count * BLOCK))
    extras = draw(st.one_of(st.just(()), st.lists(_EXTRAS, min_size=count, max_size=count)))
    return Prompt(tuple(tokens), draw(st.sampled_from(["", "l"])), draw(st.sampled_from(["", "s"])), tuple(extras))


steps = st.one_of(
    st.tuples(st.just("serve"), prompts(), st.booleans()),
    st.tuples(st.sampled_from(["evict_nth", "offload_nth", "forget_nth"]), st.integers(0, 99)),
    st.just(("clear",)),
)


def stored(hashes, tokens, parent=None, **fields):
    return BlocksStored([h.encode() for h in hashes], parent, tokens, SIZE, **fields)


def held(mirror):
    """Keys by medium, as the mirror has them."""
    keys: dict[Medium, set[bytes]] = {}
    for medium, blocks in mirror.pages(3):
        keys.setdefault(medium, set()).update(block.key for block in blocks)
    return keys


def apply(mirror, events, told):
    """Apply events, and what the mirror says of them to `told`, keys by medium."""
    for event in events:
        if isinstance(event, BlocksCleared):
            mirror.clear()
            told.clear()
            continue
        for change in mirror.apply(event):
            keys = told.setdefault(change.medium, set())
            # A change is told once: nothing comes that is there, nothing leaves that is not.
            assert (change.block.key in keys) is not change.is_held
            (keys.add if change.is_held else keys.discard)(change.block.key)


@given(st.lists(steps, max_size=30), st.integers(5, 8))
def test_the_mirror_equals_the_engine(script, capacity):
    """Duplicates, evictions in any order, adapters, salts, extras and a second medium."""
    engine, mirror, told = CacheModel(capacity), BlockMirror("m", BLOCK, 1000), {}
    for name, *arguments in script:
        getattr(engine, name)(*arguments)
        apply(mirror, engine.take_events(), told)
        assert held(mirror) == engine.held() == {medium: keys for medium, keys in told.items() if keys}
    assert not mirror.skipped


@given(st.lists(st.tuples(steps, st.sampled_from(["", "", "", "lost"])), max_size=30))
def test_after_a_loss_nothing_is_named_that_the_engine_lacks(script):
    engine, mirror, told = CacheModel(6), BlockMirror("m", BLOCK, 1000), {}
    for (name, *arguments), fate in script:
        getattr(engine, name)(*arguments)
        events = engine.take_events()
        apply(mirror, [BlocksCleared()] if fate else events, told)
        truth = engine.held()
        assert all(keys <= truth.get(medium, set()) for medium, keys in held(mirror).items())


@given(st.lists(prompts(), max_size=10), st.integers(0, 6))
def test_the_mirror_is_bounded_and_what_it_has_is_right(served, max_blocks):
    engine, mirror = CacheModel(50), BlockMirror("m", BLOCK, max_blocks)
    for prompt in served:
        engine.serve(prompt, reuse=True)
    apply(mirror, engine.take_events(), {})
    assert len(mirror) <= max_blocks
    assert held(mirror).get(Medium.HBM, set()) <= engine.held().get(Medium.HBM, set())


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.lists(st.integers(1, 4), max_size=20))
def test_chained_events_name_the_prompts_own_keys(tokens, runs):
    mirror = BlockMirror("m", SIZE, 1000)
    blocks, start, parent = [], 0, None
    for run in runs:
        names = [f"{i}" for i in range(start, min(start + run, len(tokens) // SIZE))]
        if not names:
            break
        changes = mirror.apply(stored(names, tokens[start * SIZE : (start + len(names)) * SIZE], parent))
        blocks += [change.block for change in changes]
        start, parent = start + len(names), names[-1].encode()
    assert b"".join(block.key for block in blocks) == block_keys(tokens[: start * SIZE], SIZE, root_key("m"))
    assert [block.position for block in blocks] == list(range(start))


def test_spans_are_named_by_their_first_block():
    mirror, count = BlockMirror("m", 1, 10_000), 2 * SPAN_BLOCKS + 5
    keys = block_keys(range(count), 1, root_key("m"))
    names = [i.to_bytes(8, "big") for i in range(count)]
    first = mirror.apply(BlocksStored(names[:1500], None, range(1500), 1))
    rest = mirror.apply(BlocksStored(names[1500:], names[1499], range(1500, count), 1))
    for position, change in enumerate([*first, *rest]):
        span = position // SPAN_BLOCKS * SPAN_BLOCKS * KEY_BYTES
        assert change.block == (keys[position * KEY_BYTES :][:KEY_BYTES], position, keys[span : span + KEY_BYTES])


TOKENS = list(range(12))


@pytest.mark.parametrize(
    ("events", "reasons"),
    [
        pytest.param([stored("a", TOKENS[:4], b"unknown")], {"parent": 1}, id="unknown parent"),
        pytest.param([BlocksStored([b"a"], None, TOKENS[:8], 8)], {"block_size": 1}, id="another block size"),
        pytest.param([stored("ab", TOKENS[:4])], {"content": 2}, id="fewer tokens than blocks"),
        pytest.param([stored("a", [])], {"content": 1}, id="no tokens"),
        pytest.param([BlocksRemoved([b"a", b"b"])], {"unknown": 2}, id="removed but never stored"),
        pytest.param([stored("a", TOKENS[:4]), BlocksRemoved([b"a"], Medium.HOST)], {"unknown": 1}, id="other medium"),
        pytest.param([stored("abc", TOKENS), stored("d", TOKENS[:4], b"c")], {"full": 1, "parent": 1}, id="full"),
    ],
)
def test_what_cannot_be_named_is_skipped_and_counted(events, reasons):
    mirror = BlockMirror("m", SIZE, 2)
    apply(mirror, events, {})
    assert mirror.skipped == reasons


def test_a_known_block_keeps_its_key_where_the_engine_does_not_repeat_its_content():
    mirror = BlockMirror("m", SIZE, 10)
    mirror.apply(stored("ab", TOKENS[:8], cache_salt="s"))
    changes = mirror.apply(stored("ab", [], medium=Medium.HOST))
    assert b"".join(c.block.key for c in changes) == block_keys(TOKENS[:8], SIZE, root_key("m", salt="s"))
    assert not mirror.skipped


def test_media_are_kept_apart_and_cleared_together():
    mirror, told = BlockMirror("m", SIZE, 10), {}
    key = block_keys(TOKENS[:4], SIZE, root_key("m"))
    apply(mirror, [stored("a", TOKENS[:4]), stored("a", TOKENS[:4], medium=Medium.HOST)], told)
    assert held(mirror) == told == {Medium.HBM: {key}, Medium.HOST: {key}}
    apply(mirror, [BlocksRemoved([b"a"])], told)
    assert held(mirror) == {Medium.HOST: {key}}
    apply(mirror, [BlocksCleared()], told)
    assert len(mirror) == 0


def test_a_block_is_held_while_every_group_of_layers_holds_it():
    mirror = BlockMirror("m", SIZE, 10, num_groups=2)
    first, second = (stored("a", TOKENS[:4], group=group) for group in (0, 1))
    assert [len(mirror.apply(event)) for event in (first, first, second)] == [0, 0, 1]
    removals = [BlocksRemoved([b"a"], group=0), BlocksRemoved([b"a"], group=0), BlocksRemoved([b"a"], group=1)]
    assert [[c.is_held for c in mirror.apply(event)] for event in removals] == [[], [False], []]
    assert len(mirror) == 0


def test_pages_go_on_while_the_mirror_changes():
    mirror = BlockMirror("m", SIZE, 10)
    mirror.apply(stored("abc", TOKENS))
    pages = mirror.pages(1)
    next(pages)
    mirror.apply(BlocksRemoved([b"b"]))
    assert [block.position for _, blocks in pages for block in blocks] == [2]
    pages = mirror.pages(1)
    next(pages)
    mirror.clear()
    assert list(pages) == []
