"""A worker of the simulated fleet: a SimEngine behind the proxy's own ports, in process, with everything that fails."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from omni_common.errors import DeadlineExceeded, OmniError, Unavailable
from omni_engine import ports as engine_ports
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.sim import SimEngine, SimSettings
from omni_proxy.attempt import STALLED
from omni_proxy.feed import End, Feed
from omni_proxy.fleet import Fleet
from omni_proxy.ports import FinishReason, KvHandle, PrefillAnswer, PrefillOrder, SequenceStart, Submission
from omni_proxy.ports import Timings as ProxyTimings
from omni_proxy.replica import Action, BlockChange, Holder
from omni_proxy.sampling import Sampling
from omni_proxy.stalls import TICK_S, StallWatch
from omni_proxy.worker import Load, Member, Role, Worker

STATS_S = 0.1
HBM = 1


class GatedClock:
    """The loop's time; whoever sleeps while the worker is stopped sleeps until it goes on."""

    def __init__(self) -> None:
        self.flows = asyncio.Event()
        self.flows.set()

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.flows.wait()


class _Pull:
    """A pull in progress: the holder keeps the lease until this is closed."""

    def __init__(self, holder: "SimWorker", lease_id: str, num_tokens: int) -> None:
        self._holder, self._engine, self._lease_id = holder, holder.engine, lease_id
        self.num_tokens = num_tokens

    async def close(self) -> None:
        if self._engine is not None and self._engine is self._holder.engine:
            await self._engine.release(self._lease_id)


class Pulls:
    """Stands in for the engines' sockets, which virtual time would not wait for."""

    def __init__(self, workers: Sequence["SimWorker"]) -> None:
        self._workers = workers

    async def open(self, handle: engine_ports.KvHandle, timeout_s: float) -> _Pull:
        """`omni_engine.sim.transfer.open_pull`, in process."""
        engine_id = handle.engine_id
        holder = next((w for w in self._workers if w.engine is not None and w.engine.info.engine_id == engine_id), None)
        try:
            async with asyncio.timeout(timeout_s):
                if holder is not None:
                    await holder.clock.flows.wait()
        except TimeoutError:
            raise Unavailable("the holder did not answer", reason="pull_failed") from None
        if holder is None or holder.engine is None or holder.engine.info.engine_id != engine_id:
            raise Unavailable("the holder is gone", reason="pull_failed")
        num_tokens = holder.engine._leases.pin(handle.lease_id)
        if num_tokens is None:
            raise Unavailable("the holder has no such lease", reason="pull_failed")
        return _Pull(holder, handle.lease_id, num_tokens)


class SimWorker:
    """Both ports of one worker. `start` again after `die` begins a new epoch."""

    def __init__(
        self,
        worker_id: str,
        role: Role,
        model: str,
        settings: SimSettings,
        fleet: Fleet,
        adapters: Sequence[str] = (),
    ) -> None:
        self.id, self.role = worker_id, role
        self._adapters = adapters
        self._model, self._settings, self._fleet = model, settings, fleet
        self._epoch = 0
        self._ids = itertools.count(1)
        self._feeds: dict[str, Feed] = {}
        self._sent: set[asyncio.Task[Any]] = set()
        self._living: list[asyncio.Task[None]] = []
        self.clock = GatedClock()
        self.watch = StallWatch(lambda: fleet.health.settings)
        self.ready = False
        self.engine: SimEngine | None = None
        self.member: Member | None = None

    async def start(self) -> None:
        self._epoch += 1
        self.clock = GatedClock()
        self.engine = SimEngine(self._settings, self._model, self.clock, self._adapters)
        await self.engine.start()
        info = self.engine.info
        worker = Worker(
            self.id, "in process", self.role, self._epoch, self._model, info.block_size, info.max_model_len,
            info.max_num_seqs, info.kv_connector, info.engine, info.num_blocks, info.max_num_batched_tokens,
            adapters=frozenset(info.adapters), adapter_load_ms=info.adapter_load_ms,
        )  # fmt: skip
        prefills, decodes = self.role is not Role.DECODE, self.role is not Role.PREFILL
        self.member = Member(worker, self if prefills else None, self if decodes else None)
        self.ready = self.member.is_reachable = True
        self._fleet.put(self.member)
        self._fleet.replica.join(Holder(self.id, self._epoch))
        self.watch = StallWatch(lambda: self._fleet.health.settings)
        living = (self._tell_load(), self._tell_blocks(self.engine), self._look_after())
        self._living = [asyncio.create_task(life) for life in living]

    async def die(self) -> None:
        """As a killed process: nothing is said any more, and nothing it held is left."""
        assert self.engine is not None and self.member is not None
        for task in (*self._living, *self._sent):
            task.cancel()
        self.ready = self.member.is_reachable = False
        self.engine.die("killed")
        self.break_session("session_broken")
        self.clock.flows.set()
        await self.engine.close()
        self.engine = None
        self._fleet.signal()

    async def close(self) -> None:
        if self.engine is not None:
            await self.die()

    def stop(self) -> None:
        self.clock.flows.clear()

    def go_on(self) -> None:
        self.clock.flows.set()

    def break_session(self, reason: str) -> None:
        """The connection breaks: the proxy learns it, the worker drops what was on it."""
        feeds, self._feeds = self._feeds, {}
        for request_id, feed in feeds.items():
            feed.finish(End(error=Unavailable("the session with the decode worker broke", reason=reason)))
            self._abort(request_id)

    # PrefillPort

    @property
    def is_silent(self) -> bool:
        return self.watch.is_silent

    async def prefill(self, order: PrefillOrder, timeout_s: float, headers: Mapping[str, str]) -> PrefillAnswer:
        engine = self._alive()
        sampling = _sampling(order.sampling)
        job = engine_ports.PrefillJob(
            order.request_id,
            order.token_ids,
            sampling,
            uncached_tokens=order.uncached_tokens,
            adapter=order.adapter,
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self.clock.flows.wait()
                result = await engine.prefill(job)
        except TimeoutError:
            raise DeadlineExceeded("no answer in time") from None
        handle = result.kv_handle
        return PrefillAnswer(
            result.first_token_id,
            None if result.finish_reason is None else FinishReason(result.finish_reason),
            None if handle is None else KvHandle(**{f: getattr(handle, f) for f in KvHandle.__dataclass_fields__}),
            result.cached_tokens,
            _timings(result.timings),
        )

    def release(self, lease_id: str) -> None:
        if self.engine is not None:
            self._spawn(self._when_flowing(partial(self.engine.release, lease_id)))

    # DecodePort

    def submit(self, submission: Submission) -> Feed:
        if not self.ready:
            raise Unavailable("no session with the decode worker", reason="no_session")
        number = next(self._ids)
        feed = Feed(number)
        handle = submission.kv_handle
        given = None
        if handle is not None:
            given = engine_ports.KvHandle(**{f: getattr(handle, f) for f in KvHandle.__dataclass_fields__})
        job = engine_ports.DecodeJob(
            f"{submission.request_id}@{number}",
            submission.token_ids,
            _sampling(submission.sampling),
            submission.num_output_tokens,
            given,
            uncached_tokens=submission.uncached_tokens,
            adapter=submission.adapter,
        )
        self._feeds[job.request_id] = feed
        self.watch.owes(submission.predicted_ms / 1e3)
        self._spawn(self._submitted(job, feed))
        return feed

    def abort(self, feed: Feed) -> None:
        request_id = next((name for name, known in self._feeds.items() if known is feed), None)
        if request_id is not None:
            del self._feeds[request_id]
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        if self.engine is not None:
            self._spawn(self._when_flowing(partial(self.engine.abort, [request_id])))

    async def _submitted(self, job: engine_ports.DecodeJob, feed: Feed) -> None:
        await self.clock.flows.wait()
        try:
            await self._alive().submit(job, self._on_step)
        except OmniError as error:
            if self._feeds.pop(job.request_id, None) is not None:
                feed.finish(End(error=error, rejected=True))

    def _on_step(self, outputs: Sequence[engine_ports.SequenceOutput]) -> None:
        self.watch.came()
        for output in outputs:
            feed = self._feeds.get(output.request_id)
            if feed is None:
                continue
            if output.start is not None:
                start = output.start
                feed.start = SequenceStart(
                    start.cached_tokens, start.pulled_tokens, start.fell_back, _timings(start.timings)
                )
            feed.tokens.extend(output.token_ids)
            if output.finish_reason is None:
                feed.wake()
                continue
            del self._feeds[output.request_id]
            reason = FinishReason(output.finish_reason)
            is_end = reason in (FinishReason.STOP, FinishReason.LENGTH)
            feed.finish(End(reason, None if is_end else Unavailable("the engine failed", reason="engine_error")))

    async def _look_after(self) -> None:
        """The proxy's side of the connection, as `WorkerLink` has it."""
        while True:
            await asyncio.sleep(TICK_S)
            assert self.member is not None
            if self.watch.tick(bool(self._feeds), self.member.load.step_ms / 1e3):
                self._fleet.health.silence(self.id, self._fleet.now())
                self.break_session(STALLED)

    # What it tells

    async def _tell_load(self) -> None:
        while True:
            await self.clock.sleep(STATS_S)
            assert self.engine is not None and self.member is not None
            self.watch.reported()
            stats = self.engine.stats()
            self.member.load = Load(
                running=stats.running, waiting=stats.waiting, queued_tokens=stats.queued_tokens,
                kv_usage=stats.kv_usage, leases=stats.leases, step_ms=stats.step_ms,
                context_tokens=stats.context_tokens, steps=stats.steps, busy_ms=stats.busy_ms,
                computed_prompt_tokens=stats.computed_prompt_tokens, adapters=frozenset(stats.adapters),
            )  # fmt: skip

    async def _tell_blocks(self, engine: SimEngine) -> None:
        mirror = BlockMirror(self._model, self._settings.block_size, 1_000_000)
        async for batch in engine.events():
            await self.clock.flows.wait()
            await self._fleet.replica.apply(self._changes(mirror, batch.events))

    def _changes(self, mirror: BlockMirror, events: Sequence[engine_ports.BlockEvent]) -> Iterator[BlockChange]:
        for event in events:
            if isinstance(event, engine_ports.BlocksCleared):
                mirror.clear()
                yield BlockChange(self.id, self._epoch, Action.CLEARED, HBM, b"", ())
                continue
            for change in mirror.apply(event):
                action = Action.STORED if change.is_held else Action.REMOVED
                yield BlockChange(self.id, self._epoch, action, HBM, change.block.key, (change.block.position,))

    # Life

    def _alive(self) -> SimEngine:
        if self.engine is None:
            raise Unavailable("the worker is away", reason="closed")
        return self.engine

    async def _when_flowing(self, work: Callable[[], Awaitable[object]]) -> None:
        await self.clock.flows.wait()
        await work()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._sent.add(task)
        task.add_done_callback(self._sent.discard)


def _sampling(sampling: Sampling) -> engine_ports.SamplingParams:
    return engine_ports.SamplingParams(**asdict(sampling))


def _timings(timings: engine_ports.Timings) -> ProxyTimings:
    return ProxyTimings(timings.queue_ms, timings.compute_ms, timings.transfer_ms, timings.total_ms)
