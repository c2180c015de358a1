"""Layouts in force: one per group, versions that only grow, on disk before anyone hears of them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from omni_common.errors import InvalidRequest, NotFound, ResourceExhausted
from omni_placement.layout import Layout, Topology
from omni_placement.load.book import GroupName

IMPORTED = "imported"
"""Solver of layouts that were given rather than solved for."""


class Outcome(StrEnum):
    """What became of a layout at the worker that holds the group's ranks; `NONE` where no worker was asked."""

    NONE = "none"
    APPLYING = "applying"
    APPLIED = "applied"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Published:
    """A published layout. Versions of one group count from 1; `reason` is a stable word for why it was published."""

    name: GroupName
    version: int
    solver: str
    layout: Layout
    reason: str = "requested"
    published_at_s: float = 0.0
    outcome: Outcome = Outcome.NONE


@dataclass(frozen=True, slots=True)
class Exclusions:
    """Ranks that hold nothing. Those a person named may send what they still hold; those that failed can neither send
    nor receive."""

    named: frozenset[int] = frozenset()
    failed: frozenset[int] = frozenset()
    """Reported by a worker; back when it starts anew."""
    lost: frozenset[int] = frozenset()
    """Failed before their engine had applied anything. It goes on to say that it holds what it started with, as a
    started one does, so they come back only when a person no longer names them."""

    @property
    def ranks(self) -> frozenset[int]:
        return self.named | self.silent

    @property
    def silent(self) -> frozenset[int]:
        """Ranks that can neither send nor receive."""
        return self.failed | self.lost


@dataclass(frozen=True, slots=True)
class History:
    """What is kept of a group: layouts, oldest first and the last one in force, and the ranks that hold nothing."""

    name: GroupName
    layouts: tuple[Published, ...]
    exclusions: Exclusions = Exclusions()

    @property
    def in_force(self) -> Published:
        return self.layouts[-1]

    @property
    def had_worker(self) -> bool:
        """Whether a worker was ever asked to apply one of these."""
        return any(published.outcome is not Outcome.NONE for published in self.layouts)

    def marked(self, version: int, outcome: Outcome, layout: Layout | None = None) -> "History":
        """The same with another outcome of one version, which may be no longer kept, and its experts in other slots."""
        changed = (
            replace(p, outcome=outcome, layout=layout or p.layout) if p.version == version else p for p in self.layouts
        )
        return replace(self, layouts=tuple(changed))


class Store(Protocol):
    """Where histories outlive the process."""

    def save(self, history: History) -> None: ...

    def remove(self, name: GroupName) -> None: ...


class _Watch:
    """Layouts a watcher has not seen. Over the bound only the newest of each group stays."""

    def __init__(self, model: str, group: str, after_version: int, bound: int) -> None:
        self.wake = asyncio.Event()
        self.queue: deque[Published] = deque()
        self._model, self._group, self._after, self._bound = model, group, after_version, bound

    def offer(self, published: Published) -> None:
        if self._model not in ("", published.name.model) or self._group not in ("", published.name.group):
            return
        if published.version <= self._after:
            return
        self.queue.append(published)
        if len(self.queue) > self._bound:
            self.queue = deque({p.name: p for p in self.queue}.values())
        self.wake.set()


class LayoutBook:
    """Owner of the layouts in force. What is stored, in a thread, is in force after that. `clock` is Unix time."""

    def __init__(
        self,
        store: Store | None,
        clock: Callable[[], float],
        *,
        groups: int,
        history: int,
        watch_queue: int,
    ) -> None:
        self._store, self._clock = store, clock
        self._groups, self._history, self._watch_queue = groups, history, watch_queue
        self._by_name: dict[GroupName, History] = {}
        self._watches: set[_Watch] = set()
        self._saving = asyncio.Lock()
        self._is_closed = False

    def restore(self, saved: Iterable[History]) -> None:
        self._by_name = {history.name: history for history in saved}

    @property
    def is_full(self) -> bool:
        return len(self._by_name) >= self._groups

    def names(self) -> tuple[GroupName, ...]:
        return tuple(sorted(self._by_name))

    def resolve(self, model: str, group: str) -> GroupName:
        """The group meant: the one named, else the model's only one, else the one of the empty name.

        Raises:
            InvalidRequest: no group is named, and the model has several that bear names.
        """
        known = [name for name in self.names() if name.model == model]
        unnamed = GroupName(model, "")
        if group or not known or unnamed in known:
            return GroupName(model, group)
        if len(known) > 1:
            names = ", ".join(name.group for name in known)
            raise InvalidRequest(
                f"model {model!r} has groups {names}; name one", field="group", reason="several_groups"
            )
        return known[0]

    def find(self, name: GroupName) -> Published | None:
        return self._by_name[name].in_force if name in self._by_name else None

    def get(self, name: GroupName) -> Published:
        """The layout in force. Raises `NotFound` where there is none."""
        return self.history(name).in_force

    def history(self, name: GroupName) -> History:
        """What is kept of a group. Raises `NotFound` where it has no layout."""
        if name not in self._by_name:
            known_models = {known.model for known in self._by_name}
            place = f"group {name.group!r} of model" if name.group else "model"
            raise NotFound(
                f"no layout is in force for {place} {name.model!r}",
                field="group" if name.group and name.model in known_models else "model",
                reason="no_layout",
            )
        return self._by_name[name]

    def exclusions(self, name: GroupName) -> Exclusions:
        return self._by_name[name].exclusions if name in self._by_name else Exclusions()

    async def publish(
        self,
        name: GroupName,
        layout: Layout,
        solver: str,
        reason: str,
        *,
        outcome: Outcome = Outcome.NONE,
        exclusions: Exclusions | None = None,
        failed_version: int = 0,
    ) -> Published:
        """Put a layout in force as the group's next version. Exclusions stay as they are where None is given;
        `failed_version` is marked as failed in the same write. Not to be cancelled: what is saved is in force.

        Raises:
            ResourceExhausted: the bound on groups is reached.
        """
        async with self._saving:
            known = self._by_name.get(name)
            if known is None and self.is_full:
                raise ResourceExhausted(f"layouts of {self._groups} groups are in force", reason="max_groups")
            known = known or History(name, ())
            version = known.in_force.version + 1 if known.layouts else 1
            published = Published(name, version, solver, layout, reason, self._clock(), outcome)
            kept = (*known.marked(failed_version, Outcome.FAILED).layouts, published)[-self._history :]
            await self._keep(History(name, kept, exclusions or known.exclusions))
        for watch in self._watches:
            watch.offer(published)
        return published

    async def mark(self, name: GroupName, version: int, outcome: Outcome, layout: Layout | None = None) -> None:
        """Note what became of a version, and in which slots its experts are where they are known."""
        async with self._saving:
            await self._keep(self._by_name[name].marked(version, outcome, layout))

    async def readmit(self, name: GroupName) -> None:
        """Ranks that failed may hold experts again; those a person named still hold nothing."""
        async with self._saving:
            known = self._by_name[name]
            if known.exclusions.failed:
                await self._keep(replace(known, exclusions=replace(known.exclusions, failed=frozenset())))

    async def describe(self, name: GroupName, topology: Topology) -> Published:
        """Replace the topology of the layout in force by one of the same outline that says more."""
        async with self._saving:
            known = self._by_name[name]
            told = replace(known.in_force, layout=Layout(topology, known.in_force.layout.physical))
            await self._keep(replace(known, layouts=(*known.layouts[:-1], told)))
            return told

    async def forget(self, name: GroupName) -> None:
        """Let go of a group; its versions begin anew if it comes back."""
        async with self._saving:
            if self._store is not None:
                await asyncio.to_thread(self._store.remove, name)
            self._by_name.pop(name, None)

    async def _keep(self, history: History) -> None:
        if self._store is not None:
            await asyncio.to_thread(self._store.save, history)
        self._by_name[history.name] = history

    async def watch(self, model: str, group: str, after_version: int) -> AsyncIterator[Published]:
        """What is in force and newer than `after_version`, then every later one; empty names are all there are."""
        watch = _Watch(model, group, after_version, self._watch_queue)
        for name in self.names():
            watch.offer(self._by_name[name].in_force)
        self._watches.add(watch)
        try:
            while not self._is_closed:
                # Cleared before the queue is read, so that nothing set during a yield is missed.
                watch.wake.clear()
                while watch.queue:
                    yield watch.queue.popleft()
                await watch.wake.wait()
        finally:
            self._watches.discard(watch)

    def close(self) -> None:
        """End all watches."""
        self._is_closed = True
        for watch in self._watches:
            watch.wake.set()
