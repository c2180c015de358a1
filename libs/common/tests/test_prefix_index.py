"""The index against a plain model of it: dictionaries of sets, read block by block."""

import random
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from omni_common.prefix_index import DISK, HBM, HOST, REMOTE, PrefixIndex, warm_up

MEDIA = (HBM, HOST, DISK, REMOTE)
EXPECTED = 0
WORKERS = [f"w{i}" for i in range(7)]
POOLS = {"pool-b": HOST, "pool-a": HOST, "pool-c": REMOTE}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


def key_of(*parts: int) -> bytes:
    return random.Random(hash(parts)).randbytes(16)


def prompts() -> list[list[bytes]]:
    """Paths of a tree: prompts that share beginnings of several lengths."""
    trunk = [key_of(0, i) for i in range(40)]
    branch = trunk + [key_of(1, i) for i in range(300)]
    return [
        trunk + [key_of(2, i) for i in range(400)],
        branch + [key_of(3, i) for i in range(200)],
        branch[:200] + [key_of(4, i) for i in range(20)],
        [key_of(5, i) for i in range(500)],
        [key_of(6, 0)],
    ]


PROMPTS = prompts()
spans = st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, 540), st.integers(1, 540))
workers = st.sampled_from(WORKERS)
members = st.sampled_from([*WORKERS, *POOLS])
media = st.sampled_from(MEDIA)


class Model:
    """Per medium (`EXPECTED` is one more), block and member; nothing is compact, nothing is late."""

    def __init__(self) -> None:
        self.members: dict[str, int | None] = {}
        self.held: dict[tuple[int, bytes], set[str]] = defaultdict(set)
        self.ends: dict[tuple[str, bytes], float] = {}
        self.now_s = 0.0

    def drop(self, member: str) -> None:
        for holders in self.held.values():
            holders.discard(member)
        self.ends = {(m, key): end for (m, key), end in self.ends.items() if m != member}

    def withdraw(self, member: str, keys: list[bytes]) -> None:
        for key in keys:
            self.held[EXPECTED, key].discard(member)
            self.ends.pop((member, key), None)

    def expect(self, member: str, keys: list[bytes], ttl_s: float) -> None:
        for key in keys:
            if member not in self.held[HBM, key]:
                self.held[EXPECTED, key].add(member)
                self.ends[member, key] = self.now_s + ttl_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for (member, key), end in list(self.ends.items()):
            if end <= self.now_s:
                self.withdraw(member, [key])

    def tiers(self) -> list[tuple[str, int, str]]:
        """Name, medium or EXPECTED, pool."""
        tiers = []
        for name, medium in (("hbm", HBM), ("expected", EXPECTED), ("host", HOST), ("disk", DISK), ("remote", REMOTE)):
            tiers.append((name, medium, ""))
            pools = sorted(m for m, of in self.members.items() if of == medium)
            tiers += [(f"pool:{pool}", medium, pool) for pool in pools]
        return tiers

    def depths(self, member: str, keys: list[bytes]) -> tuple[int, ...]:
        """Also for "", a worker that holds nothing."""
        found = []
        for reach in range(1, len(self.tiers()) + 1):
            depth = 0
            while depth < len(keys) and self.has(member, keys[depth], self.tiers()[:reach]):
                depth += 1
            found.append(depth)
        return tuple(found)

    def has(self, member: str, key: bytes, tiers: list[tuple[str, int, str]]) -> bool:
        for _, medium, pool in tiers:
            if pool and any(pool in self.held.get((of, key), ()) for of in MEDIA):
                return True
            if not pool and member in self.held.get((medium, key), ()):
                return True
        return False


def part(span: tuple[int, int, int]) -> tuple[int, list[bytes]]:
    """A run of a prompt's blocks and its position; may be empty."""
    prompt, start, length = span
    return start, PROMPTS[prompt][start : start + length]


class IndexAgainstModel(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.model = Model()
        self.index = PrefixIndex(max_blocks=100_000, clock=lambda: self.model.now_s)
        for worker in WORKERS[:3]:
            self.join(worker)

    @rule(member=members)
    def join(self, member: str) -> None:
        self.index.join(member, pool_medium=POOLS.get(member))
        self.model.members.setdefault(member, POOLS.get(member))

    @rule(member=members)
    def leave(self, member: str) -> None:
        self.index.leave(member)
        self.model.members.pop(member, None)
        self.model.drop(member)

    @rule(member=members)
    def clear(self, member: str) -> None:
        if member in self.model.members:
            self.index.clear(member)
            self.model.drop(member)
        else:
            with pytest.raises(KeyError):
                self.index.clear(member)

    @rule(member=members, medium=media, span=spans, shuffled=st.booleans())
    def store(self, member: str, medium: int, span: tuple[int, int, int], shuffled: bool) -> None:
        start, keys = part(span)
        positions = list(range(start, start + len(keys)))
        if shuffled:
            random.Random(start).shuffle(positions)
            keys = [PROMPTS[span[0]][position] for position in positions]
        if member not in self.model.members:
            with pytest.raises(KeyError):
                self.index.store(member, medium, b"".join(keys), positions)
            return
        self.index.store(member, medium, b"".join(keys), positions if shuffled else (start,))
        for key in keys:
            self.model.held[medium, key].add(member)
        if medium == HBM:
            self.model.withdraw(member, keys)

    @rule(member=members, medium=media, span=spans, every=st.integers(1, 3))
    def remove(self, member: str, medium: int, span: tuple[int, int, int], every: int) -> None:
        keys = part(span)[1][::every]
        if member not in self.model.members:
            return
        self.index.remove(member, medium, b"".join(keys))
        for key in keys:
            self.model.held[medium, key].discard(member)
        if medium == HBM:
            self.model.withdraw(member, keys)

    @rule(member=members, prompt=st.integers(0, len(PROMPTS) - 1), length=st.integers(0, 540), ttl_s=st.integers(0, 9))
    def expect(self, member: str, prompt: int, length: int, ttl_s: int) -> None:
        keys = PROMPTS[prompt][:length]
        self.index.expect(member, b"".join(keys), ttl_s)
        if member in self.model.members and member not in POOLS:
            self.model.expect(member, keys, ttl_s)
        self.model.advance(0)

    @rule(member=members, span=spans)
    def withdraw(self, member: str, span: tuple[int, int, int]) -> None:
        keys = part(span)[1]
        self.index.withdraw(member, b"".join(keys))
        if member in self.model.members:
            self.model.withdraw(member, keys)

    @rule(seconds=st.integers(1, 5))
    def advance(self, seconds: int) -> None:
        self.model.advance(seconds)

    @rule(prompt=st.integers(0, len(PROMPTS) - 1), length=st.integers(0, 540))
    def lookup(self, prompt: int, length: int) -> None:
        keys = PROMPTS[prompt][:length]
        found = self.index.lookup(b"".join(keys))
        assert found.num_blocks == len(keys)
        assert [(t.name, t.pool) for t in found.tiers] == [(name, pool) for name, _, pool in self.model.tiers()]
        pooled = self.model.depths("", keys)
        rows = {worker: self.model.depths(worker, keys) for worker in WORKERS}
        assert {worker: found.of(worker) for worker in WORKERS} == rows
        assert found.of("stranger") == pooled
        expected_rows = {worker: row for worker, row in rows.items() if row != pooled}
        if any(pooled):
            expected_rows[""] = pooled
        assert dict(found.rows()) == expected_rows
        assert found.longest() == max([pooled[-1], *(row[-1] for row in rows.values())])

    @rule(member=members)
    def held(self, member: str) -> None:
        if member not in self.model.members:
            return
        told = {(m, page[i : i + 16]) for m, page, _ in self.index.held(member) for i in range(0, len(page), 16)}
        assert told == {(m, key) for (m, key), who in self.model.held.items() if member in who and m != EXPECTED}

    @invariant()
    def counts_agree(self) -> None:
        held, known = defaultdict(set), set()
        self.index.lookup(b"")  # lets expectations end
        for (medium, key), who in self.model.held.items():
            known |= {key} if who else set()
            if medium != EXPECTED:
                held[key] |= who
        usage = self.index.usage()
        assert (usage.blocks, usage.entries) == (len(known), sum(map(len, held.values())))
        assert sorted(self.index.members) == sorted(self.model.members)


TestIndexAgainstModel = IndexAgainstModel.TestCase
TestIndexAgainstModel.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
