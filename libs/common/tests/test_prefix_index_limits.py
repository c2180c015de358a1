"""What the model test does not reach: size, crowds, churn, eviction, misuse."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_common import _prefix_table
from omni_common.compiled import kernel
from omni_common.prefix_index import DISK, HBM, HOST, PrefixIndex, warm_up


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


def index_of(max_blocks: int, *workers: str) -> PrefixIndex:
    index = PrefixIndex(max_blocks=max_blocks, clock=lambda: 0.0)
    for worker in workers:
        index.join(worker)
    return index


def chain(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(16 * length)


def held_keys(index: PrefixIndex, member: str) -> set[bytes]:
    return {page[i : i + 16] for _, page, _ in index.held(member) for i in range(0, len(page), 16)}


@pytest.mark.parametrize("batch", [1, 7, 500, 70_000])
def test_growing_loses_nothing(batch: int) -> None:
    """Also between the pieces in which the table grows."""
    index, keys = index_of(1_000_000, "w"), chain(0, max(5_000, 2 * batch))
    draw = random.Random(1)
    for start in range(0, len(keys) // 16, batch):
        end = min(start + batch, len(keys) // 16)
        index.store("w", HBM, keys[16 * start : 16 * end], (start,))
        probe = draw.randrange(end)
        assert index.lookup(keys[16 * probe :]).longest() == end - probe
    assert index.usage().blocks == len(keys) // 16
    assert held_keys(index, "w") == {keys[i : i + 16] for i in range(0, len(keys), 16)}
    for start in range(0, len(keys) // 16, batch):
        index.remove("w", HBM, keys[16 * start : 16 * (start + batch)])
    assert index.usage().blocks == 0


def test_removing_while_growing() -> None:
    index, keys = index_of(1_000_000, "w"), chain(0, 40_000)
    present: set[int] = set()
    draw = random.Random(2)
    for step in range(10_000):
        block = draw.randrange(step, step + 20_000) if step % 3 else draw.choice([*present][:5] or [0])
        here = keys[16 * block : 16 * block + 16]
        if step % 3:
            index.store("w", HBM, here, (block,))
            present.add(block)
        else:
            index.remove("w", HBM, here)
            present.discard(block)
    assert held_keys(index, "w") == {keys[16 * block : 16 * block + 16] for block in present}


def test_a_crowd_of_workers_and_as_many_sets() -> None:
    """More members than one word of bits, joining while others hold blocks; equal sets are kept once."""
    index, keys = index_of(10_000), chain(0, 400)
    depths = {f"w{i}": random.Random(i).randrange(401) for i in range(300)}
    for worker, depth in depths.items():
        index.join(worker)
        index.store(worker, HBM, keys[: 16 * depth], (0,))
    found = index.lookup(keys)
    assert {worker: found.of(worker)[0] for worker in depths} == depths
    assert index.usage().entries == sum(depths.values())
    assert index.usage().holder_sets == len({depth for depth in depths.values() if depth})


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_equal_holders_share_one_set(seed: int) -> None:
    draw = random.Random(seed)
    workers = [f"w{i}" for i in range(12)]
    index, blocks = index_of(10_000, *workers), [chain(i, 1) for i in range(300)]
    holders: list[set[str]] = [set() for _ in blocks]
    for _ in range(600):
        block, worker = draw.randrange(len(blocks)), draw.choice(workers)
        if worker in holders[block] or draw.random() < 0.2:
            index.remove(worker, HBM, blocks[block])
            holders[block].discard(worker)
        else:
            index.store(worker, HBM, blocks[block], (0,))
            holders[block].add(worker)
    assert index.usage().holder_sets == len({frozenset(who) for who in holders if who})


def test_bits_of_those_who_left_are_used_again() -> None:
    now_s = 0.0
    index, keys = PrefixIndex(max_blocks=100_000, clock=lambda: now_s), chain(0, 3_000)
    index.join("stays")
    index.store("stays", HBM, keys, (0,))
    before = index.usage().bytes
    for generation in range(2_000):
        now_s += 0.1
        worker = f"w{generation}"
        index.join(worker)
        assert index.lookup(keys).of(worker)[-1] == 0
        index.store(worker, HBM, keys[: 16 * 64], (0,))
        index.expect(worker, keys[: 16 * 100], 1.0)
        assert index.lookup(keys).of(worker)[:2] == (64, 100)
        if generation % 2:
            index.clear(worker)
            assert index.lookup(keys).of(worker)[-1] == 0
        index.leave(worker)
    assert index.lookup(keys).of("stays")[0] == 3_000
    assert index.usage().bytes < 1.4 * before


def test_who_joins_holds_nothing_of_a_former_owner_of_its_bit() -> None:
    """Rows move while they are swept: others are stored and removed all the time."""
    index, keys = index_of(100_000, "stays", "busy"), chain(0, 5_900)
    index.store("stays", HBM, keys, (0,))
    for generation in range(150):
        index.join(f"w{generation}")
        assert held_keys(index, f"w{generation}") == set()
        index.store(f"w{generation}", HBM, keys, (0,))
        index.leave(f"w{generation}")
        for step in range(16):
            passing = chain(1 + 16 * generation + step, 200)
            index.store("busy", HBM, passing, (0,))
            index.remove("busy", HBM, passing)


@pytest.mark.parametrize("seed", range(12))
def test_held_misses_nothing_that_moves(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(_prefix_table, "_SCAN_SLOTS", 256)
    index, keys = index_of(1_000_000, "w", "v"), chain(seed, 6_000)
    index.store("w", HBM, keys, (0,))
    told: set[bytes] = set()
    for number, (_, page, _) in enumerate(index.held("w")):
        told |= {page[i : i + 16] for i in range(0, len(page), 16)}
        passing = chain(1_000 * (seed + 1) + number, 50)
        index.store("v", HBM, passing, (0,))
        if number % 2:
            index.remove("v", HBM, passing)
    assert told == {keys[i : i + 16] for i in range(0, len(keys), 16)}


prompts = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 30), st.integers(1, 60)), min_size=5, max_size=80)


@given(prompts, st.integers(40, 300), st.lists(st.booleans(), min_size=80, max_size=80))
@settings(max_examples=150, deadline=None)
def test_eviction_never_takes_a_prefix_before_its_tail(
    asked: list[tuple[int, int, int]], max_blocks: int, looked_up: list[bool]
) -> None:
    """Prompts share beginnings with others of their family, and are stored or looked up from their first block on."""
    index = index_of(max_blocks, "w")
    seen: list[bytes] = []
    for (family, shared, length), lookup in zip(asked, looked_up, strict=False):
        keys = (chain(family, shared) + chain(1000 + 100 * family + shared, length))[: 16 * (max_blocks * 3 // 4)]
        if lookup:
            index.lookup(keys)
        else:
            index.store("w", HBM, keys, (0,))
            seen.append(keys)
        assert index.usage().blocks <= max_blocks
        held = held_keys(index, "w")
        for known in seen:
            present = [known[i : i + 16] in held for i in range(0, len(known), 16)]
            assert present == sorted(present, reverse=True)
        if not lookup:
            assert all(keys[i : i + 16] in held for i in range(0, len(keys), 16))


def test_a_large_index_evicts_ahead_of_need_and_the_oldest() -> None:
    index = index_of(100_000, "w")
    keys = [chain(i, 500) for i in range(600)]
    most = 0
    for i, prompt in enumerate(keys):
        for start in range(0, 500, 50):
            index.store("w", HBM, prompt[16 * start : 16 * (start + 50)], (start,))
        index.lookup(keys[i % 5])  # a few stay in use
        most = max(most, index.usage().blocks)
    usage = index.usage()
    assert 80_000 < usage.blocks <= most <= 100_000
    assert usage.evicted_blocks == 300_000 - usage.blocks
    assert [index.lookup(keys[i]).longest() for i in (599, 550, 500, 4, 0)] == [500] * 5
    assert [index.lookup(keys[i]).longest() for i in (5, 100, 300)] == [0] * 3


@pytest.mark.parametrize("workers", [8, 512])
def test_bytes_per_entry(workers: int) -> None:
    names = [f"w{i}" for i in range(workers)]
    index, draw = index_of(1_000_000, *names), random.Random(0)
    entries = 0
    for seed in range(600):
        length = draw.randrange(50, 600)
        keys = chain(seed, length)
        index.store(draw.choice(names), HBM, keys, (0,))
        entries += length
    usage = index.usage()
    assert usage.blocks == usage.entries == entries
    assert usage.bytes / usage.entries < 120


def test_held_comes_in_pages_and_fills_another_index() -> None:
    index, other, keys = index_of(300_000, "w"), index_of(300_000, "w"), chain(0, 150_000)
    index.store("w", HBM, keys, (0,))
    index.store("w", DISK, keys[: 16 * 1000], (0,))
    for medium, page, positions in index.held("w"):
        assert len(page) == 16 * len(positions) <= 16 * 65_536
        other.store("w", medium, page, positions.tolist())
    for i in (0, 999, 149_999):
        assert other.lookup(keys[16 * i :]).of("w") == index.lookup(keys[16 * i :]).of("w")
    positions_of = {page[16 * i :][:16]: int(p) for _, page, at in other.held("w") for i, p in enumerate(at)}
    assert positions_of == {keys[16 * i : 16 * i + 16]: i for i in range(150_000)}


def test_held_survives_changes_between_pages() -> None:
    index, keys = index_of(1_000_000, "w", "v"), chain(0, 100_000)
    index.store("w", HBM, keys, (0,))
    told: set[bytes] = set()
    for number, (_, page, _) in enumerate(index.held("w")):
        told |= {page[i : i + 16] for i in range(0, len(page), 16)}
        if number < 3:
            index.store("v", HBM, chain(number + 1, 60_000), (0,))
    assert told == {keys[i : i + 16] for i in range(0, len(keys), 16)}


def test_what_is_expected_is_bounded() -> None:
    """The oldest expectations end early."""
    index = index_of(8_000, "w")
    for seed in range(30):
        index.expect("w", chain(seed, 100), 60.0)
    assert index.usage().blocks <= 1024
    assert index.lookup(chain(29, 100)).longest() == 100
    assert index.lookup(chain(0, 100)).longest() == 0


def test_an_answer_outlives_changes() -> None:
    index, keys = index_of(1_000, "a", "b"), chain(0, 10)
    index.store("a", HBM, keys, (0,))
    found = index.lookup(keys)
    index.clear("a")
    index.store("b", HBM, keys, (0,))
    index.join("p", pool_medium=HOST)
    assert found.of("a") == (10, 10, 10, 10, 10)
    assert found.of("b") == (0, 0, 0, 0, 0)


def test_hottest_are_where_lookups_ended() -> None:
    index, keys = index_of(1_000, "a", "b"), chain(0, 10)
    index.store("a", HBM, keys, (0,))
    index.store("b", HBM, keys[: 16 * 4], (0,))
    for _ in range(3):
        index.lookup(keys)
    for _ in range(5):
        index.lookup(keys[: 16 * 4])
    found = [(hot.key, hot.blocks, hot.hits, hot.members) for hot in index.hottest(5)]
    assert found == [(keys[48:64], 4, 5, ("a", "b")), (keys[144:], 10, 3, ("a",))]
    assert index.hottest(1) == index.hottest(5)[:1]


def test_a_member_of_another_kind_starts_empty() -> None:
    index, keys = index_of(1_000, "a"), chain(0, 10)
    index.store("a", HBM, keys, (0,))
    index.join("a", pool_medium=DISK)
    assert index.lookup(keys).longest() == 0
    assert [tier.name for tier in index.lookup(keys).tiers] == ["hbm", "expected", "host", "disk", "pool:a", "remote"]


@pytest.mark.parametrize(
    ("medium", "keys", "positions"),
    [
        pytest.param(HBM, bytes(15), (0,), id="half a key"),
        pytest.param(0, bytes(16), (0,), id="no medium"),
        pytest.param(9, bytes(16), (0,), id="unknown medium"),
        pytest.param(HBM, bytes(48), (0, 1), id="positions of other keys"),
        pytest.param(HBM, bytes(16), (), id="no position"),
    ],
)
def test_malformed_changes_are_refused(medium: int, keys: bytes, positions: tuple[int, ...]) -> None:
    index = index_of(100, "w")
    with pytest.raises(ValueError, match=r"medium|keys|positions"):
        index.store("w", medium, keys, positions)
    assert index.usage().blocks == 0


def test_empty_changes_and_questions() -> None:
    index = index_of(100, "w")
    index.store("w", HBM, b"", (0,))
    index.remove("w", HBM, b"")
    index.expect("w", b"", 1.0)
    found = index.lookup(b"")
    assert (found.num_blocks, found.longest(), list(found.rows())) == (0, 0, [])
    assert list(PrefixIndex(max_blocks=1).lookup(bytes(16)).rows()) == []
    assert [*index.held("w")] == []
    assert np.all([index.usage().entries == 0, index.usage().holder_sets == 0])


def test_without_a_writable_folder_kernels_are_compiled_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])

    def increased(number: int) -> int:
        return number + 1

    assert kernel(increased)(1) == 2
