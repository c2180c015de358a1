"""Whatever happens between a proxy and the kvstore, its copy ends as the kvstore's; and marks come and go with legs."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from omni_common.blocks import KEY_BYTES, block_keys, root_key
from omni_common.prefix_index import DISK, HBM, HOST, REMOTE, PrefixIndex
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.replica import Action, BlockChange, Holder, Position, Replica
from omni_proxy.scheduling.forecast import LoadCost

MEDIA = (HBM, HOST, DISK, REMOTE)
WORKERS = ("a", "b", "c")
CHAINS = [block_keys([seed] * 3 + list(range(9)), 1, root_key("m")) for seed in range(3)]
Held = dict[tuple[str, int], dict[bytes, int]]
Event = Holder | str | BlockChange


def split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def new_replica(ttl_s: float = 60.0) -> Replica:
    return Replica(lambda: PrefixIndex(max_blocks=100_000), ttl_s, PrefixMetrics(CollectorRegistry()))


def held(replica: Replica) -> Held:
    found: Held = {}
    for member in replica.index.members:
        for medium, keys, positions in replica.index.held(member):
            found.setdefault((member, medium), {}).update(zip(split(keys), positions.tolist(), strict=True))
    return found


class Truth:
    """The kvstore's state, and the events that led there: a holder joins, a name leaves, blocks change."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.epochs: dict[str, int] = {}
        self.held: Held = {}

    def add(self, event: Event) -> None:
        self.events.append(event)
        name = event if isinstance(event, str) else event.id if isinstance(event, Holder) else event.holder_id
        if not isinstance(event, BlockChange) or event.action is Action.CLEARED:
            self.held = {key: blocks for key, blocks in self.held.items() if key[0] != name}
        if isinstance(event, Holder):
            self.epochs[name] = event.epoch
        elif isinstance(event, str):
            self.epochs.pop(name, None)
        else:
            blocks = self.held.setdefault((name, event.medium), {})
            for offset, key in enumerate(split(event.keys)):
                if event.action is Action.STORED:
                    blocks[key] = event.positions[0] + offset
                else:
                    blocks.pop(key, None)
            self.held = {key: blocks for key, blocks in self.held.items() if blocks}

    def pages(self, size: int) -> Iterable[BlockChange]:
        for (name, medium), blocks in self.held.items():
            entries = list(blocks.items())
            for start in range(0, len(entries), size):
                part = entries[start : start + size]
                keys = b"".join(key for key, _ in part)
                yield BlockChange(name, self.epochs[name], Action.STORED, medium, keys, [at for _, at in part])


async def tell(replica: Replica, event: Event, position: int) -> None:
    if isinstance(event, Holder):
        replica.join(event)
    elif isinstance(event, str):
        replica.leave(event)
    else:
        await replica.apply([event])
    replica.followed(Position("x", position), is_degraded=False)


async def take_snapshot(replica: Replica, truth: Truth, page: int, cut: bool = False) -> None:
    replica.begin_snapshot()
    for name, epoch in truth.epochs.items():
        replica.join(Holder(name, epoch))
    for change in truth.pages(page):
        await replica.apply([change])
    if not cut:
        await replica.complete_snapshot()
        replica.followed(Position("x", len(truth.events)), is_degraded=False)


@st.composite
def histories(draw: Callable[..., object]) -> list[object]:
    """Steps: events, "cut" (the watch breaks), "back" (it goes on), "lag" (a snapshot instead of what was missed)."""
    steps = st.one_of(
        st.tuples(
            st.just("block"), st.sampled_from(WORKERS), st.sampled_from(list(Action)), st.sampled_from(MEDIA),
            st.integers(0, 2), st.integers(0, 11), st.integers(1, 12),
        ),
        st.tuples(st.sampled_from(["restart", "leave"]), st.sampled_from(WORKERS)),
        st.tuples(st.sampled_from(["cut", "back", "lag", "torn"])),
    )  # fmt: skip
    return draw(st.lists(steps, max_size=60))  # type: ignore[return-value]


def event_of(step: tuple, truth: Truth) -> Event | None:
    kind, name = step[0], step[1]
    if kind == "restart":
        return Holder(name, truth.epochs.get(name, 0) + 1 + len(truth.events))
    if name not in truth.epochs:
        return None
    if kind == "leave":
        return name
    _, _, action, medium, chain, first, count = step
    if action is Action.CLEARED:
        return BlockChange(name, truth.epochs[name], action, 0, b"", [])
    keys = CHAINS[chain][KEY_BYTES * first : KEY_BYTES * (first + count)]
    return BlockChange(name, truth.epochs[name], action, medium, keys, [first]) if keys else None


async def replay(steps: list[tuple], page: int) -> None:
    truth, replica, is_cut = Truth(), new_replica(), False
    for name in WORKERS:
        truth.add(Holder(name, 1))
    await take_snapshot(replica, truth, page)
    for step in steps:
        if step[0] == "cut":
            replica.lost()
            is_cut = True
        elif step[0] in ("lag", "torn"):
            await take_snapshot(replica, truth, page, cut=step[0] == "torn")
            is_cut = step[0] == "torn"
            if is_cut:
                replica.lost()
        elif step[0] == "back" and is_cut:
            await resume(replica, truth)
            is_cut = False
        elif step[0] != "back" and (event := event_of(step, truth)) is not None:
            truth.add(event)
            if not is_cut:
                await tell(replica, event, len(truth.events))
    await resume(replica, truth)
    assert held(replica) == truth.held
    assert set(replica.index.members) == set(truth.epochs)


async def resume(replica: Replica, truth: Truth) -> None:
    assert replica.position is not None
    for number in range(replica.position.event, len(truth.events)):
        await tell(replica, truth.events[number], number + 1)


@settings(deadline=None, max_examples=200)
@given(histories(), st.integers(1, 20))
def test_every_way_to_the_end_ends_alike(steps, page):
    asyncio.run(replay(steps, page))


async def test_large_changes_leave_the_event_loop_to_others():
    replica, turns, blocks = new_replica(), 0, 50_000
    keys = block_keys(range(blocks), 1, root_key("m"))
    change = BlockChange("a", 1, Action.STORED, HBM, keys, [0])

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    replica.join(Holder("a", 1))
    counting = asyncio.create_task(count())
    await replica.apply([change])
    assert turns >= blocks // 4096
    replica.begin_snapshot()
    replica.join(Holder("a", 1))
    turns = 0
    await replica.apply([change])
    await replica.complete_snapshot()
    assert turns >= 1
    counting.cancel()
    assert replica.index.lookup(keys).of("a")[0] == blocks
    assert held(replica)["a", HBM] == dict(zip(split(keys), range(blocks), strict=True))


async def test_a_snapshot_keeps_the_marks_of_running_legs():
    replica = new_replica()
    replica.adopt(Holder("a", 1))
    with replica.mark("a", CHAINS[0]) as mark:
        assert replica.index.lookup(CHAINS[0]).of("a")[:2] == (0, 12)
        replica.begin_snapshot()
        replica.join(Holder("b", 1))
        await replica.complete_snapshot()
        assert replica.index.lookup(CHAINS[0]).of("a")[:2] == (0, 12)
        mark.computed()
    assert replica.index.lookup(CHAINS[0]).of("a")[:2] == (12, 12)


async def test_a_withdrawn_mark_leaves_those_of_others():
    replica = new_replica()
    replica.adopt(Holder("a", 1))
    shared = CHAINS[0][: 4 * KEY_BYTES]
    with ExitStack() as stack, replica.mark("a", shared):
        stack.enter_context(replica.mark("a", CHAINS[0]))
        assert replica.index.lookup(CHAINS[0]).of("a")[1] == 12
        stack.close()
        assert replica.index.lookup(CHAINS[0]).of("a")[1] == 4
    assert replica.index.lookup(CHAINS[0]).of("a")[1] == 0


async def test_a_snapshot_carries_over_what_only_the_proxy_knows():
    replica = new_replica()
    for name in ("stays", "goes", "told"):
        replica.adopt(Holder(name, 1))
        replica.computed(name, CHAINS[0])
    replica.begin_snapshot()
    replica.join(Holder("told", 1))
    replica.join(Holder("pool", 1, HOST, LoadCost(1.0, 1.0)))
    await replica.apply([BlockChange("told", 1, Action.STORED, HBM, CHAINS[1], [0])])
    replica.drop("goes")
    await replica.complete_snapshot()
    assert held(replica).keys() == {("stays", HBM), ("told", HBM)}
    assert set(held(replica)["told", HBM]) == set(split(CHAINS[1]))
    assert set(replica.index.members) == {"stays", "told", "pool"}
    assert replica.pool_costs == {"pool": LoadCost(1.0, 1.0)}


@pytest.mark.parametrize("is_degraded", [False, True])
async def test_a_position_is_only_kept_where_it_can_be_resumed(is_degraded):
    replica = new_replica()
    replica.followed(Position("x", 1), is_degraded=False)
    assert (replica.position, replica.age_s) == (None, None)
    await take_snapshot(replica, Truth(), 1)
    replica.followed(Position("x", 5), is_degraded=False)
    replica.followed(None, is_degraded=is_degraded)
    assert replica.position == (None if is_degraded else Position("x", 5))
    assert replica.age_s == 0
    replica.lost()
    assert replica.age_s is not None
