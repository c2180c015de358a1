from hypothesis import given
from hypothesis import strategies as st

from omni_common.blocks import block_keys, root_key
from omni_engine.hosting.mirror import BlockMirror, KeyEvent
from omni_engine.ports import BlocksCleared, BlocksRemoved, BlocksStored, Medium

SIZE = 4


def stored(hashes, tokens, parent=None, **fields):
    return BlocksStored([h.encode() for h in hashes], parent, tokens, SIZE, **fields)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.lists(st.integers(1, 4), max_size=20))
def test_chained_events_name_the_prompts_own_keys(tokens, runs):
    mirror = BlockMirror("m", SIZE, 1000)
    keys, start, parent = b"", 0, None
    for run in runs:
        names = [f"{i}" for i in range(start, min(start + run, len(tokens) // SIZE))]
        if not names:
            break
        event = mirror.apply(stored(names, tokens[start * SIZE : (start + len(names)) * SIZE], parent))
        keys += event.keys
        start, parent = start + len(names), names[-1].encode()
    assert keys == block_keys(tokens[: start * SIZE], SIZE, root_key("m"))
    assert b"".join(k for _, k in mirror.held()) == keys
    assert mirror.skipped == 0


def test_what_cannot_be_named_is_skipped_and_counted():
    mirror = BlockMirror("m", SIZE, 2)
    tokens = list(range(8))
    cases = [
        (stored("a", tokens[:4], b"unknown"), None),
        (BlocksStored([b"a"], None, tokens, 8), None),
        (BlocksRemoved([b"a"]), None),
    ]
    for event, expected in cases:
        assert mirror.apply(event) is expected
    assert mirror.skipped == 3
    event = mirror.apply(stored("abc", list(range(12))))
    assert len(event.keys) == 32
    assert (len(mirror), mirror.skipped) == (2, 4)


def test_media_are_kept_apart_and_cleared_together():
    mirror = BlockMirror("m", SIZE, 10)
    tokens = list(range(4))
    key = block_keys(tokens, SIZE, root_key("m"))
    mirror.apply(stored("a", tokens))
    mirror.apply(stored("a", tokens, medium=Medium.HOST))
    assert list(mirror.held()) == [(Medium.HBM, key), (Medium.HOST, key)]
    assert mirror.apply(BlocksRemoved([b"a"])) == KeyEvent("removed", Medium.HBM, key)
    assert list(mirror.held()) == [(Medium.HOST, key)]
    assert mirror.apply(BlocksCleared()) == KeyEvent("cleared")
    assert len(mirror) == 0
