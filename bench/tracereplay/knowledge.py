"""What the router knows of the workers' caches when it chooses: one class per answer.

A cache's change reaches `changed` at once and `reported` late, as a worker's published events do; each kind uses the
one it is allowed.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from omni_common.prefix_index import HBM, PrefixIndex
from omni_engine.ports import BlockEvent, BlocksRemoved, BlocksStored
from omni_proxy.scheduling.forecast import Forecast, LoadCost, Outlook
from tracereplay.trace import BLOCK_TOKENS

_WHILE_RUNNING_S = 1e6
_OWN_COSTS = {name: LoadCost(0.0, 0.0) for name in ("host", "disk", "remote")}


class Knowledge(Protocol):
    """`keys` are those of a prompt's reusable blocks in lookups, and of all its full blocks in `dispatched`."""

    def forecasts(self, keys: Sequence[bytes]) -> Callable[[int], Forecast]:
        """What each worker, by number, will find of the prompt."""

    def dispatched(self, worker: int, keys: Sequence[bytes]) -> None: ...

    def prefilled(self, worker: int, keys: Sequence[bytes]) -> None: ...

    def changed(self, worker: int, events: Sequence[BlockEvent]) -> None: ...

    def reported(self, worker: int, events: Sequence[BlockEvent], positions: Mapping[bytes, int]) -> None: ...


class Uninformed:
    """Nothing about prefixes: the least loaded worker is chosen."""

    def forecasts(self, keys: Sequence[bytes]) -> Callable[[int], Forecast]:
        return lambda worker: Forecast()

    def dispatched(self, worker: int, keys: Sequence[bytes]) -> None: ...

    def prefilled(self, worker: int, keys: Sequence[bytes]) -> None: ...

    def changed(self, worker: int, events: Sequence[BlockEvent]) -> None: ...

    def reported(self, worker: int, events: Sequence[BlockEvent], positions: Mapping[bytes, int]) -> None: ...


class Index(Uninformed):
    """The proxy's replica: late events, and marks of what was dispatched."""

    def __init__(self, workers: int, capacity_blocks: int, clock: Callable[[], float], *, marks_s: float) -> None:
        """`marks_s`: how long a mark outlives its prefill; 0 sets none."""
        self._index = PrefixIndex(max_blocks=2 * workers * capacity_blocks, clock=clock)
        self._names = [str(number) for number in range(workers)]
        self._marks_s = marks_s
        for name in self._names:
            self._index.join(name)

    def forecasts(self, keys: Sequence[bytes]) -> Callable[[int], Forecast]:
        outlook = Outlook(self._index.lookup(b"".join(keys)), BLOCK_TOKENS, _OWN_COSTS, {})
        return lambda worker: outlook.of(self._names[worker])

    def dispatched(self, worker: int, keys: Sequence[bytes]) -> None:
        if self._marks_s:
            self._index.expect(self._names[worker], b"".join(keys), _WHILE_RUNNING_S)

    def prefilled(self, worker: int, keys: Sequence[bytes]) -> None:
        if self._marks_s:
            self._index.expect(self._names[worker], b"".join(keys), self._marks_s)

    def reported(self, worker: int, events: Sequence[BlockEvent], positions: Mapping[bytes, int]) -> None:
        name = self._names[worker]
        for kind, group in itertools.groupby(events, type):
            keys = [key for event in group for key in getattr(event, "block_hashes", ())]
            if kind is BlocksStored:
                self._index.store(name, HBM, b"".join(keys), [positions[key] for key in keys])
            elif kind is BlocksRemoved:
                self._index.remove(name, HBM, b"".join(keys))
            else:
                self._index.clear(name)


class Oracle(Uninformed):
    """Every cache exactly and at once."""

    def __init__(self, workers: int) -> None:
        self._held: list[set[bytes]] = [set() for _ in range(workers)]

    def forecasts(self, keys: Sequence[bytes]) -> Callable[[int], Forecast]:
        return lambda worker: Forecast(cached_tokens=_leading(keys, self._held[worker]) * BLOCK_TOKENS)

    def changed(self, worker: int, events: Sequence[BlockEvent]) -> None:
        held = self._held[worker]
        for event in events:
            if isinstance(event, BlocksStored):
                held.update(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                held.difference_update(event.block_hashes)
            else:
                held.clear()


class OracleAhead(Oracle):
    """Also what waits or is computed on every worker, which will be in its cache by the time of this prompt's turn."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._coming: list[Counter[bytes]] = [Counter() for _ in range(workers)]

    def forecasts(self, keys: Sequence[bytes]) -> Callable[[int], Forecast]:
        def of(worker: int) -> Forecast:
            held, coming = self._held[worker], self._coming[worker]
            now = _leading(keys, held)
            then = now + _leading(keys[now:], held, coming)
            return Forecast(then * BLOCK_TOKENS, (then - now) * BLOCK_TOKENS)

        return of

    def dispatched(self, worker: int, keys: Sequence[bytes]) -> None:
        self._coming[worker].update(keys)

    def prefilled(self, worker: int, keys: Sequence[bytes]) -> None:
        self._coming[worker] -= Counter(keys)


class OwnHistory(Uninformed):
    """The prompts sent to each worker, least recently used blocks forgotten beyond the true size of its cache."""

    def __init__(self, workers: int, capacity_blocks: int) -> None:
        self._sent: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(workers)]
        self._capacity_blocks = capacity_blocks

    def forecasts(self, keys: Sequence[bytes]) -> Callable[[int], Forecast]:
        return lambda worker: Forecast(cached_tokens=_leading(keys, self._sent[worker]) * BLOCK_TOKENS)

    def dispatched(self, worker: int, keys: Sequence[bytes]) -> None:
        sent = self._sent[worker]
        for key in reversed(keys):  # so that a prompt's tail is forgotten before its head
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self._capacity_blocks:
            sent.popitem(last=False)


def _leading(keys: Iterable[bytes], *known: Mapping[bytes, object] | set[bytes]) -> int:
    """Leading keys that are in any of `known`."""
    count = 0
    for key in keys:
        if not any(key in held for held in known):
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of knowledge: its title, and how it is made for (workers, blocks per cache, clock, mark seconds)."""

    title: str
    make: Callable[[int, int, Callable[[], float], float], Knowledge]


VARIANTS: Mapping[str, Variant] = {
    "index": Variant(
        "our index: late events, marks", lambda n, blocks, clock, marks_s: Index(n, blocks, clock, marks_s=marks_s)
    ),
    "unmarked": Variant("our index without marks", lambda n, blocks, clock, _: Index(n, blocks, clock, marks_s=0.0)),
    "oracle": Variant("oracle: every cache at once", lambda n, *_: Oracle(n)),
    "oracle_ahead": Variant("oracle that also sees what waits", lambda n, *_: OracleAhead(n)),
    "history": Variant("own routing history, no events", lambda n, blocks, *_: OwnHistory(n, blocks)),
    "none": Variant("nothing: least loaded", lambda *_: Uninformed()),
}
