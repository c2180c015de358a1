"""All workers as this proxy sees them: who takes work, and what a prompt meets there.

Written by the membership and the links on the event loop, read by the scheduler.
"""

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from omni_proxy.adapters import KnownAdapters
from omni_proxy.attempt import Attempt
from omni_proxy.health import Health, HealthSettings
from omni_proxy.ledger import Ledger
from omni_proxy.replica import Holder, Replica
from omni_proxy.scheduling.columns import INTS, Columns
from omni_proxy.scheduling.forecast import LoadCost, Outlook
from omni_proxy.scheduling.times import Capacity, Seen, WorkerTimes
from omni_proxy.scheduling.view import Bools, FleetView, Floats, Ints, Pairing, Rows
from omni_proxy.worker import HARDWARE_LABEL, Load, Member, Worker


class _Serving(NamedTuple):
    """Who takes work for one adapter, or for the model itself."""

    prefills: Bools
    decodes: Bools
    computing: Rows
    """Slots of those that compute prompts: prefill workers that pair, or where there are none the decode workers."""
    deciding: Rows
    """Slots of decode workers."""
    takers: Hashable
    """Who they are, to compare."""

    @classmethod
    def of(cls, slots: Rows, prefills: Bools, decodes: Bools, pairing: Pairing, adapter: str = "") -> "_Serving":
        deciding = slots[decodes]
        able = pairing.can_pair(np.flatnonzero(prefills), np.flatnonzero(decodes)).any(axis=1)
        computing = slots[prefills][able] if able.any() else deciding
        takers = (computing.tobytes(), deciding.tobytes()) if len(deciding) else adapter
        return cls(prefills, decodes, computing, deciding, takers)


class _Usable(NamedTuple):
    """Members that take work, and their columns that change with membership only."""

    members: Sequence[Member]
    slots: Rows
    model: _Serving
    adapters: dict[str, _Serving]
    """Of those that were asked for since the members are the same."""
    has_slot: Bools
    """All true, and `no_ms` all 0: what a request for the model itself meets."""
    no_ms: Floats
    adapter_load_ms: Floats
    apart: Rows
    """Slots of those that compute prompts and do not decode."""
    ids: tuple[str, ...]
    pairings: dict[str, Pairing]
    """By adapter, of those that were asked for; the model's own by the empty name."""
    labels: tuple[Mapping[str, str], ...]
    max_num_seqs: Ints
    by_block_size: Mapping[int, tuple[Rows, Sequence[str]]]
    """Rows and ids."""

    def serving(self, adapter: str) -> _Serving:
        if not adapter:
            return self.model
        found = self.adapters.get(adapter)
        if found is None:
            serves = np.array([adapter in m.worker.adapters for m in self.members], np.bool_)
            prefills, decodes = self.model.prefills & serves, self.model.decodes & serves
            found = _Serving.of(self.slots, prefills, decodes, self.pairing_of(adapter), adapter)
            self.adapters[adapter] = found
        return found

    def pairing_of(self, adapter: str) -> Pairing:
        """Who hands over blocks that were computed with it; empty: with the model alone."""
        found = self.pairings.get(adapter)
        if found is None:
            workers = [m.worker for m in self.members]
            found = self.pairings[adapter] = _pairing(workers, adapter)
        return found

    def in_slots(self, adapter: str) -> Bools:
        """Which workers have it in one, or will with what was just sent to them."""
        return np.array([m.has_in_slot(adapter) for m in self.members], np.bool_)


class PromptForecast(NamedTuple):
    """Of every worker, `ids` in the order of the columns."""

    ids: tuple[str, ...]
    tokens: Ints
    """Rows cached, expected and loadable."""
    load_ms: Floats


class Fleet:
    """Members by worker id, and a signal for those who wait for a change."""

    def __init__(
        self,
        model: str,
        replica: Replica,
        load_costs: Mapping[str, LoadCost],
        *,
        now: Callable[[], float] = time.monotonic,
        times: Callable[[Columns], WorkerTimes] = WorkerTimes,
        health: Health | None = None,
        saw_step: Callable[[Seen], None] | None = None,
        adapters: KnownAdapters | None = None,
    ) -> None:
        """`load_costs`: of a worker's own tiers `host`, `disk` and `remote`; `now`: seconds; `saw_step` hears of the
        step times in workers' reports beside what was predicted."""
        self._model = model
        self._members: dict[str, Member] = {}
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._load_costs = load_costs
        self.now = now
        self._usable: _Usable | None = None
        self._saw_step = saw_step
        self._refused: frozenset[str] = frozenset()
        self._left: set[str] = set()
        """Workers that are gone while something of ours is not over yet; they keep their slots until then."""
        self.health = health or Health(HealthSettings.model_validate({}))
        self.columns = Columns()
        self.ledger = Ledger(self.columns, now)
        self.times = times(self.columns)
        self.replica = replica
        self.adapters = KnownAdapters() if adapters is None else adapters

    @property
    def members(self) -> Sequence[Member]:
        return tuple(self._members.values())

    def get(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    def put(self, member: Member) -> None:
        """Add a worker or replace its earlier epoch, whose cached blocks are gone."""
        worker = member.worker
        slot = self.columns.slot(worker.id)
        self._left.discard(worker.id)
        if (earlier := self._members.get(worker.id)) is not None:
            earlier.on_load = None
        self._members[worker.id] = member
        self.health.forget(worker.id)
        if self._serves(member):
            self.times.join(slot, _capacity(worker))
            member.on_load = lambda before, load: self._loaded(member, slot, before, load)
            self._loaded(member, slot, Load(), member.load)
            self.replica.adopt(Holder(worker.id, worker.epoch))
        else:
            self.times.leave(slot)
        self.signal()

    def drop(self, worker_id: str) -> None:
        member = self._members.pop(worker_id, None)
        if member is not None:
            member.on_load = None
            self.times.leave(self.columns.slot(worker_id))
            self.replica.drop(worker_id)
            self._left.add(worker_id)
            self._left = {left for left in self._left if not self.ledger.forget(left)}
            self.health.forget(worker_id)
            self.signal()

    def signal(self) -> None:
        """Wake everyone who waits in `changed`."""
        self._usable = None
        members = self._members.values()
        self.adapters.told({name for m in members if m.is_listed and self._serves(m) for name in m.worker.adapters})
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener()

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call it whenever a worker comes, goes or changes state."""
        self._listeners.append(listener)

    async def changed(self) -> None:
        """Until a worker came, went, or changed state; the caller bounds the wait."""
        await self._changed.wait()

    @property
    def max_model_len(self) -> int | None:
        """Tokens that every usable decode worker can hold."""
        lengths = [m.worker.max_model_len for m in self._members.values() if m.decodes and self._serves(m)]
        return min(filter(None, lengths), default=None)

    @property
    def can_decode(self) -> bool:
        return any(m.decodes and m.refusal is None and self._serves(m) for m in self._members.values())

    def refusal(self, member: Member) -> str | None:
        """Why the worker takes no work, its health included; None if it does."""
        return member.refusal or self.health.refusal(member.worker.id, self.now())

    def attempt(self, worker_id: str, adapter: str = "") -> Attempt:
        """A leg is sent to the worker; tell it what became of it."""
        if adapter and (member := self._members.get(worker_id)) is not None:
            member.sends(adapter)
        return Attempt(self.health, worker_id, self.now)

    @property
    def block_sizes(self) -> Sequence[int]:
        """Of the model's workers, each once, in order of size."""
        return sorted({m.worker.block_size for m in self._members.values() if self._serves(m)})

    def forecast(self, keys_of: Callable[[int], bytes]) -> PromptForecast:
        """What the workers that take work will find of a prompt; `keys_of(block_size)` are its block keys.

        One lookup per block size answers for all of them.
        """
        usable = self._takers()
        found = np.zeros((4, len(usable.ids)))
        for size, (rows, ids) in usable.by_block_size.items():
            outlook = Outlook(self.replica.lookup(keys_of(size), size), size, self._load_costs, self.replica.pool_costs)
            found[:, rows] = outlook.columns(ids)
        return PromptForecast(usable.ids, found[:3].astype(np.int64), found[3])

    def is_current(self, forecast: PromptForecast) -> bool:
        """The same workers take work as when it was made."""
        return self._takers().ids is forecast.ids

    def view(self, found: PromptForecast, prompt_tokens: int, output_tokens: int, adapter: str = "") -> FleetView:
        """The fleet as of now for a prompt with a current forecast; load columns are copies.

        Who does not serve the `adapter` takes neither leg.
        """
        usable = self._usable
        if usable is None or usable.ids is not found.ids:
            raise ValueError("the forecast is of other workers")
        slots, columns, now_s = usable.slots, self.columns, self.now()
        cached, expected, loadable = found.tokens
        uncached = np.maximum(prompt_tokens - cached, 0)
        load = dict(zip(INTS, columns.ints.take(slots, 1), strict=True))
        serving, has_adapter, adapter_ms = usable.model, usable.has_slot, usable.no_ms
        if adapter:
            serving, has_adapter = usable.serving(adapter), usable.in_slots(adapter)
            adapter_ms = np.where(has_adapter, 0.0, usable.adapter_load_ms)
        return FleetView(
            ids=usable.ids,
            prefills=serving.prefills,
            decodes=serving.decodes,
            pairing=usable.pairing_of(adapter),
            labels=usable.labels,
            cached_tokens=cached,
            expected_tokens=expected,
            loadable_tokens=loadable,
            load_ms=found.load_ms,
            has_adapter=has_adapter,
            adapter_ms=adapter_ms,
            kv_usage=columns.kv_usage[slots],
            max_num_seqs=usable.max_num_seqs,
            stats_age_s=now_s - columns.stats_at_s[slots],
            times=self.times.of(slots, now_s, prompt_tokens, output_tokens, uncached),
            **load,
        )

    def usable_slots(self) -> tuple[Rows, np.ndarray, np.ndarray]:
        """Slots of the workers that take work, and which of them prefill and decode."""
        usable = self._takers()
        return usable.slots, usable.model.prefills, usable.model.decodes

    def computing_slots(self, adapter: str = "") -> Rows:
        """Of workers that take work and compute prompts: prefill workers, or where there are none decode workers."""
        return self._takers().serving(adapter).computing

    def deciding_slots(self, adapter: str = "") -> Rows:
        """Of decode workers that take work."""
        return self._takers().serving(adapter).deciding

    def takers(self, adapter: str) -> Hashable:
        """Equal for adapters that the same workers serve, and unlike any other's where nobody does."""
        return self._takers().serving(adapter).takers

    def coming(self) -> int:
        """Sequences whose prompts are on workers that do not decode: a decode worker gets each."""
        columns, apart = self.columns, self._takers().apart
        return int(columns.own_prefills[apart].sum() + columns.others_prefills[apart].sum())

    def usable_block_sizes(self) -> Iterable[int]:
        """Of the workers that take work, each once."""
        return self._takers().by_block_size

    def usable_ids(self) -> tuple[str, ...]:
        """In the order of `usable_slots`."""
        return self._takers().ids

    def _takers(self) -> _Usable:
        """Those who take work now. Looked for again when a member changed, or somebody's health."""
        if self._usable is None:
            self._tell_presence()
        refused = self.health.refused(self.now())
        if self._usable is None or refused != self._refused:
            self._refused, self._usable = refused, self._look(refused)
        return self._usable

    def _tell_presence(self) -> None:
        for member in self._members.values():
            if member.refusal is None and self._serves(member):
                self.health.join(member.worker.id, [*["prefill"] * member.prefills, *["decode"] * member.decodes])
            else:
                self.health.away(member.worker.id)

    def _look(self, refused: frozenset[str]) -> _Usable:
        members = [
            m for m in self._members.values() if m.refusal is None and self._serves(m) and m.worker.id not in refused
        ]
        workers = [m.worker for m in members]
        slots = np.array([self.columns.slot(w.id) for w in workers], np.intp)
        prefills = np.array([m.prefills for m in members], np.bool_)
        decodes = np.array([m.decodes for m in members], np.bool_)
        sizes = np.array([w.block_size for w in workers], np.int64)
        pairing = _pairing(workers, "")
        return _Usable(
            members=members,
            slots=slots,
            model=_Serving.of(slots, prefills, decodes, pairing),
            adapters={},
            has_slot=np.ones(len(slots), np.bool_),
            no_ms=np.zeros(len(slots)),
            adapter_load_ms=np.array([w.adapter_load_ms for w in workers], np.float64),
            apart=slots[prefills & ~decodes],
            ids=tuple(w.id for w in workers),
            pairings={"": pairing},
            labels=tuple(w.labels for w in workers),
            max_num_seqs=np.array([w.max_num_seqs for w in workers], np.int64),
            by_block_size={
                int(size): (np.flatnonzero(sizes == size), [w.id for w in workers if w.block_size == size])
                for size in np.unique(sizes)
            },
        )

    def _serves(self, member: Member) -> bool:
        return member.worker.model == self._model

    def _loaded(self, member: Member, slot: int, before: Load, load: Load) -> None:
        columns = self.columns
        columns.running[slot] = load.running
        columns.waiting[slot] = load.waiting
        columns.kv_usage[slot] = load.kv_usage
        columns.context_tokens[slot] = load.context_tokens
        columns.others_prefills[slot] = load.others_prefills
        columns.others_uncached_tokens[slot] = load.others_uncached_tokens
        columns.others_sequences[slot] = load.others_sequences
        columns.stats_at_s[slot] = self.now()
        if load.prompts and not before.prompts:
            self.times.heard_of_prompts(slot, load.prompts, load.prompt_tokens, load.prompt_busy_ms)
        steps = load.steps - before.steps
        # A prefill worker's steps are prompts, and no example for who decodes.
        if member.decodes and steps > 0 and before.steps:
            seen = self.times.saw_steps(
                slot,
                (before.running + load.running) / 2,
                (before.context_tokens + load.context_tokens) / 2,
                (load.computed_prompt_tokens - before.computed_prompt_tokens) / steps,
                (load.busy_ms - before.busy_ms) / steps,
            )
            if seen is not None and self._saw_step is not None:
                self._saw_step(seen)
        elif not (steps or load.running or load.waiting):
            self.times.saw_idle(slot, self.now())


def _pairing(workers: Sequence[Worker], adapter: str) -> Pairing:
    return Pairing([w.kv_kind(adapter) for w in workers], [w.group for w in workers])


def _capacity(worker: Worker) -> Capacity:
    kind = f"{worker.engine}/{worker.labels.get(HARDWARE_LABEL, '')}"
    return Capacity(
        kind,
        worker.kv_connector,
        worker.max_num_seqs,
        worker.num_blocks * worker.block_size,
        worker.max_num_batched_tokens,
    )
