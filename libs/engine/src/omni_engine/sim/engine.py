"""SimEngine: the `Engine` port over a scheduler, a clock and a timing model."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any

import xxhash

from omni_common.errors import Cancelled, FailedPrecondition, InvalidRequest, Unavailable
from omni_engine import ports
from omni_engine.ports import DecodeJob, EventBatch, FinishReason, KvHandle, PrefillJob, PrefillResult, SequenceOutput
from omni_engine.sim.clock import Clock, WallClock
from omni_engine.sim.experts import SimExperts
from omni_engine.sim.leases import LeaseTable
from omni_engine.sim.scheduler import Scheduler, Step
from omni_engine.sim.sequence import SimSequence
from omni_engine.sim.settings import SimSettings
from omni_engine.sim.tokens import TokenStream
from omni_engine.sim.transfer import LeaseServer, open_pull, weights_in

log = logging.getLogger(__name__)

VERSION = "1"
_MAX_EVENT_BATCHES = 10_000
_MAX_LOGPROBS = 20
"""As vLLM's default."""
_SMOOTHING = 0.1


class SimEngine:
    """A model that needs no hardware. `faults` may be changed while it runs."""

    def __init__(
        self, settings: SimSettings, model: str = "sim", clock: Clock | None = None, adapters: Iterable[str] = ()
    ) -> None:
        self._settings = settings
        self._clock = clock or WallClock()
        served = tuple(sorted(adapters))
        self._scheduler = Scheduler(settings, settings.adapter_slots or len(served))
        self._work = asyncio.Event()
        self._leases = LeaseTable(self._scheduler.pool, self._clock, settings.lease_s, self._work)
        self._server = LeaseServer(self._leases.pin, self._free_lease, settings.lease_s)
        self._by_id: dict[str, SimSequence] = {}
        self._events: asyncio.Queue[EventBatch] | None = None
        self._event_sequence = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._step_ms = 0.0
        self._steps = 0
        self._busy_s = 0.0
        self._generated = 0
        self._computed_prompt = 0
        self.faults = settings.faults.model_copy()
        self._experts: SimExperts | None = None
        if settings.experts.num_ranks:
            self._experts = SimExperts(settings, self.faults, self._clock, self._work.set)
        self.info = ports.EngineInfo(
            model=model,
            engine="sim",
            engine_version=VERSION,
            engine_id=uuid.uuid4().hex,
            kv_connector="sim",
            block_size=settings.block_size,
            num_blocks=settings.num_blocks,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            num_moe_layers=settings.num_moe_layers,
            num_experts=settings.num_experts,
            fixed_role=settings.fixed_role,
            num_ep_ranks=settings.experts.num_ranks,
            expert_slots_per_rank=settings.expert_slots_per_rank,
            ranks_per_host=settings.experts.ranks_per_host,
            expert_bytes=settings.experts.expert_bytes,
            adapters=served,
            adapter_load_ms=settings.timing.adapter_load_ms if served else 0.0,
            weights={"": settings.weights} if settings.weights else {},
        )

    async def start(self) -> None:
        await self._clock.sleep(self._settings.start_s)
        await self._server.start(self._settings.kv_host)
        self._tasks = [self._spawn(self._run(), "sim-steps"), self._spawn(self._leases.run(), "sim-leases")]
        if self.faults.die_after_s is not None:
            self._tasks.append(self._spawn(self._die_after(self.faults.die_after_s), "sim-death"))

    async def prefill(self, job: PrefillJob) -> PrefillResult:
        self._check(job)
        if self.faults.fail_next_prefills:
            self.faults.fail_next_prefills -= 1
            raise Unavailable("prefill failed on purpose", reason="fault")
        sequence = self._sequence(job, len(job.token_ids))
        result: asyncio.Future[PrefillResult] = asyncio.get_running_loop().create_future()
        sequence.result = result
        self._enqueue(sequence)
        try:
            return await result
        except asyncio.CancelledError:
            self._drop(sequence)
            # Cancelled in the moment it finished: nobody will learn of the lease.
            if result.done() and not result.cancelled() and result.exception() is None and result.result().kv_handle:
                self._leases.free(job.request_id)
            raise

    async def release(self, lease_id: str) -> bool:
        return self._leases.free(lease_id)

    async def submit(self, job: DecodeJob, sink: ports.StepSink) -> None:
        self._check(job)
        handle = job.kv_handle
        if handle is not None and handle.block_size != self._settings.block_size:
            raise FailedPrecondition(
                f"blocks of {handle.block_size} tokens cannot be pulled here", reason="kv_mismatch"
            )
        if handle is not None and (weights_in(handle) or self._settings.weights) != self._settings.weights:
            raise FailedPrecondition(
                "the blocks were computed with other weights than this engine's", reason="kv_mismatch"
            )
        sequence = self._sequence(job, len(job.token_ids) - job.num_output_tokens)
        sequence.sink, sequence.handle = sink, handle
        self._enqueue(sequence)

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            sequence = self._by_id.get(request_id)
            if sequence is None:
                continue
            self._drop(sequence)
            if sequence.handle is not None:
                self._end_lease_of(sequence.handle)
            if sequence.result is not None and not sequence.result.done():
                sequence.result.set_exception(Cancelled("the prefill was aborted"))

    def stats(self) -> ports.EngineStats:
        scheduler = self._scheduler
        return ports.EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.pulling),
            queued_tokens=scheduler.queued_tokens,
            kv_usage=scheduler.pool.usage,
            leases=len(self._leases),
            step_ms=self._step_ms,
            generated_tokens=self._generated,
            computed_prompt_tokens=self._computed_prompt,
            context_tokens=scheduler.context_tokens,
            steps=self._steps,
            busy_ms=self._busy_s * 1e3,
            adapters=scheduler.adapters,
        )

    async def events(self) -> AsyncIterator[EventBatch]:
        queue = self._events = asyncio.Queue(_MAX_EVENT_BATCHES)
        while True:
            yield await queue.get()

    async def expert_load(self) -> ports.ExpertLoad | None:
        return self._experts.take() if self._experts else None

    def expert_layout(self) -> ports.ExpertLayout | None:
        return self._experts.layout if self._experts else None

    async def move_experts(self, moves: Sequence[ports.ExpertMove], layout: ports.ExpertLayout) -> None:
        await self._ranks().move(moves, layout)

    async def kernel_calls(self) -> ports.KernelCalls | None:
        return None

    async def drop_ranks(self, ranks: Sequence[int]) -> None:
        self._ranks().drop(ranks)

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._dead)

    async def close(self) -> None:
        pulls = [s.pull for s in self._scheduler.pulling if s.pull is not None]
        for sequence in list(self._by_id.values()):
            self._drop(sequence)
        for task in (*self._tasks, *self._ending):
            task.cancel()
        if owned := [*self._tasks, *self._ending, *pulls]:
            await asyncio.wait(owned)
        if self._experts is not None:
            self._experts.end("the engine was closed")
        await self._server.close()

    def die(self, reason: str) -> None:
        """End as a crashed engine does: everything fails, nothing is accepted any more."""
        if self._dead.done():
            return
        self._dead.set_result(reason)
        if self._experts is not None:
            self._experts.end(reason)
        for sequence in list(self._by_id.values()):
            self._drop(sequence)
            if sequence.sink is not None:
                output = SequenceOutput(sequence.request_id, (), finish_reason=FinishReason.ERROR, detail=reason)
                sequence.sink([output])
            elif sequence.result is not None and not sequence.result.done():
                sequence.result.set_exception(Unavailable(reason, reason="engine_dead"))

    def _require_alive(self) -> None:
        if self._dead.done():
            raise Unavailable(self._dead.result(), reason="engine_dead")
        if not self._tasks:
            raise FailedPrecondition("the engine has not started", reason="not_started")

    def _ranks(self) -> SimExperts:
        self._require_alive()
        if self._experts is None:
            raise FailedPrecondition("this engine has no expert-parallel ranks", reason="no_expert_parallelism")
        return self._experts

    def _check(self, job: PrefillJob | DecodeJob) -> None:
        self._require_alive()
        if job.adapter and job.adapter not in self.info.adapters:
            raise FailedPrecondition(f"no adapter {job.adapter!r} is served", reason="no_adapter", field="adapter")
        if job.request_id in self._by_id:
            raise InvalidRequest(f"request {job.request_id!r} is running", field="request_id")
        if not 0 < len(job.token_ids) < self._settings.max_model_len:
            limit = self._settings.max_model_len
            message = f"{len(job.token_ids)} tokens do not fit a model length of {limit}"
            raise InvalidRequest(message, field="token_ids")
        if (job.sampling.logprobs or 0) > _MAX_LOGPROBS:
            raise InvalidRequest(f"logprobs of at most {_MAX_LOGPROBS} tokens are told", field="sampling.logprobs")

    def _sequence(self, job: PrefillJob | DecodeJob, num_prompt: int) -> SimSequence:
        tokens, sampling = list(job.token_ids), job.sampling
        stream = TokenStream(self._settings, tokens[:num_prompt], sampling, len(tokens) - num_prompt, job.adapter)
        now_s = self._clock.now_s()
        traffic_class = self._experts.class_of(tokens[:num_prompt]) if self._experts else 0
        return SimSequence(
            job.request_id,
            tokens,
            num_prompt,
            sampling,
            stream,
            job.cache_salt,
            now_s,
            job.believed_tokens,
            traffic_class,
            job.adapter,
        )

    def _enqueue(self, sequence: SimSequence) -> None:
        self._by_id[sequence.request_id] = sequence
        self._scheduler.add(sequence)
        self._work.set()

    def _drop(self, sequence: SimSequence) -> None:
        if self._by_id.get(sequence.request_id) is not sequence:
            return
        del self._by_id[sequence.request_id]
        if sequence.pull is not None:
            sequence.pull.cancel()
        self._scheduler.pool.release(self._scheduler.remove(sequence))
        self._work.set()

    def _end_lease_of(self, handle: KvHandle) -> None:
        """Tell the holder that the blocks will not be pulled: whoever sent the sequence may not know."""

        async def end() -> None:
            with contextlib.suppress(Unavailable):
                await (await open_pull(handle, self._settings.pull_timeout_s)).close()

        task = self._spawn(end(), "sim-unpulled")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _free_lease(self, lease_id: str) -> None:
        self._leases.free(lease_id)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """A defect in a task ends the engine instead of leaving sequences waiting for ever."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("simulated engine failed", exc_info=error)
            self.die(f"{task.get_name()} failed: {type(error).__name__}")

    async def _run(self) -> None:
        """The engine's steps, until the engine dies or is closed."""
        while not self._dead.done():
            if self._experts is not None:
                await self._experts.at_boundary()
            step = self._scheduler.plan(self._clock.now_s())
            for sequence, handle in step.pulls:
                sequence.pull = self._spawn(self._pull(sequence, handle), "sim-pull")
            if not step.chunks:
                self._publish()
                self._work.clear()
                await self._work.wait()
                continue
            started_s, generated = self._clock.now_s(), self._generated
            duration_ms = await self._compute(step)
            self._step_ms += _SMOOTHING * (duration_ms - self._step_ms)
            self._commit(step)
            if self._generated > generated:
                self._steps += 1
                self._busy_s += self._clock.now_s() - started_s
            self._publish()

    async def _compute(self, step: Step) -> float:
        """Let the step's time pass; returns it in milliseconds."""
        duration_ms = step.duration_ms(self._settings.timing) * self.faults.slow_factor
        if self._experts is None:
            await self._clock.sleep(duration_ms / 1e3)
            return duration_ms
        routed = self._experts.route((s.traffic_class, n) for s, n in step.chunks)
        duration_ms *= routed.factor
        await self._clock.sleep(duration_ms / 1e3)
        self._experts.done(routed, duration_ms)
        return duration_ms

    def _commit(self, step: Step) -> None:
        by_sink: dict[ports.StepSink, list[SequenceOutput]] = {}
        for sequence, count in step.chunks:
            if self._by_id.get(sequence.request_id) is not sequence or not sequence.blocks:
                continue
            prompt_left = max(0, sequence.num_prompt - sequence.computed)
            self._computed_prompt += min(count, prompt_left)
            if not self._scheduler.commit(sequence, count):
                continue
            self._generated += 1
            if sequence.sink is None:
                self._finish_prefill(sequence)
            else:
                by_sink.setdefault(sequence.sink, []).append(self._advance(sequence))
        for sink, outputs in by_sink.items():
            sink(outputs)

    def _advance(self, sequence: SimSequence) -> SequenceOutput:
        position = sequence.num_output
        token = sequence.stream.token(position)
        sequence.tokens.append(token)
        sequence.generated += 1
        output = SequenceOutput(sequence.request_id, (token,), logprobs=sequence.stream.logprobs(token))
        if not sequence.has_started:
            sequence.has_started = True
            timings = sequence.timings(self._clock.now_s())
            output.start = ports.SequenceStart(sequence.cached, sequence.pulled, sequence.fell_back, timings)
        output.finish_reason = sequence.stream.finish(token, position)
        is_full = len(sequence.tokens) >= self._settings.max_model_len
        if output.finish_reason is None and (sequence.generated >= sequence.sampling.max_tokens or is_full):
            output.finish_reason = FinishReason.LENGTH
        if output.finish_reason is not None:
            self._drop(sequence)
        return output

    def _finish_prefill(self, sequence: SimSequence) -> None:
        answer = sequence.result
        if answer is None or answer.done():
            # Its caller was cancelled in this very pass of the event loop: nobody would learn of a lease.
            self._drop(sequence)
            return
        token = sequence.stream.token(0)
        finish = sequence.stream.finish(token, 0)
        timings, blocks, name = sequence.timings(self._clock.now_s()), sequence.blocks, sequence.request_id
        handle = None
        if finish is None:
            sequence.blocks = []
            self._leases.grant(name, blocks, sequence.num_prompt)
            handle = self._server.handle(
                name, sequence.num_prompt, len(blocks), self._settings, self.info.engine_id, self._settings.weights
            )
        self._drop(sequence)
        logprobs = sequence.stream.logprobs(token)
        answer.set_result(PrefillResult(token, finish, handle, sequence.cached, timings, logprobs))

    async def _pull(self, sequence: SimSequence, handle: KvHandle) -> None:
        """Fetch what the local cache lacks; where that fails the prompt is computed here."""
        started_s = self._clock.now_s()
        arrived = sequence.cached
        try:
            if self._is_failing(sequence.request_id):
                raise Unavailable("pull failed on purpose", reason="fault")
            pull = await open_pull(handle, self._settings.pull_timeout_s)
            try:
                missing = max(0, pull.num_tokens - sequence.cached)
                await self._clock.sleep(self._settings.timing.transfer_s(missing) * self.faults.slow_factor)
            finally:
                await pull.close()
            sequence.pulled, arrived = missing, sequence.cached + missing
        except Unavailable as error:
            log.warning("pull failed; computing the prompt here", extra={"reason": error.message})
            sequence.fell_back = True
        sequence.transfer_s = self._clock.now_s() - started_s
        self._scheduler.pulled(sequence, arrived)
        self._work.set()

    def _is_failing(self, request_id: str) -> bool:
        return xxhash.xxh3_64_intdigest(request_id.encode()) / 2**64 < self.faults.fail_pulls

    def _publish(self) -> None:
        events = self._scheduler.pool.take_events()
        if not events or self._events is None:
            return
        self._event_sequence += 1
        if self.faults.drop_next_event_batches:
            self.faults.drop_next_event_batches -= 1
        elif not self._events.full():
            self._events.put_nowait(EventBatch(self._event_sequence, events))

    async def _die_after(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self.die("the simulated engine died on purpose")
