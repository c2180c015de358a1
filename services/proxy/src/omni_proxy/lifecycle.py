"""The life of one sequence: choose workers, prefill, decode; try again elsewhere; leave nothing behind.

decide -> prefill p -> first token out -> submit to d -> tokens ... finish
   ^          | fails: another p, else decode alone      | leg breaks: another d, from prompt + tokens sent
   +----------+                                          +---> decide (decode only)
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from omni_common.errors import Code, DeadlineExceeded, InvalidRequest, OmniError, Unavailable
from omni_proxy.continuation import FirstToken, continuation, first_token_source
from omni_proxy.feed import End, Feed
from omni_proxy.fleet import Member, Worker
from omni_proxy.flow.gate import Turn
from omni_proxy.flow.ticket import Ticket
from omni_proxy.foresight import Computing, Foresight
from omni_proxy.ledger import Charge
from omni_proxy.marks import Mark
from omni_proxy.ports import FinishReason, KvHandle, PrefillAnswer, PrefillOrder, SequenceStart, Submission
from omni_proxy.room import least_work
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.sequence import Scheduler, SequenceJob, SequenceRecord, TokenBatch
from omni_proxy.tracing import RequestTrace

_FINAL = frozenset({Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNAUTHENTICATED, Code.DEADLINE_EXCEEDED})
_PAUSE_S = 0.1
_BYTES_PER_TOKEN = 8
_FRESH_MS = 1.0
_ENDED = frozenset({FinishReason.STOP, FinishReason.LENGTH})


@dataclass(slots=True)
class _Lease:
    """Blocks that wait on a prefill worker, until decode has pulled them or they are given up."""

    handle: KvHandle
    worker: Worker
    release: Callable[[str], None]


@dataclass(slots=True)
class _Progress:
    sent: list[int] = field(default_factory=list)
    lease: _Lease | None = None
    first_token: FirstToken = FirstToken.DECODE_ALONE
    excluded: set[str] = field(default_factory=set)
    decode: str | None = None
    mark: Mark | None = None
    computing: Computing | None = None
    charge: Charge | None = None


class SequenceRun:
    """Runs one sequence. Close the iterator of `stream` to abort it: both legs are freed then."""

    def __init__(self, scheduler: Scheduler, job: SequenceJob, trace: RequestTrace) -> None:
        self._scheduler = scheduler
        self._job = job
        self._trace = trace
        self._now = asyncio.get_running_loop().time
        self._foresight = Foresight(job.prompt, scheduler.keys, scheduler.fleet, scheduler.metrics.prefix, self._now)
        self._output_tokens = scheduler.lengths.expect(job.sampling.max_tokens)
        self._has_fresh_look = False
        self._progress = _Progress()
        self.record = SequenceRecord()

    async def stream(self) -> AsyncGenerator[TokenBatch, None]:
        """Token batches until one has a finish reason.

        Raises:
            OmniError: no worker could run the sequence, or go on with it.
        """
        turn: Turn | None = None
        try:
            turn = await self._turn()
            answer = await self._prefilled()
            if answer is not None and (batch := self._first_batch(answer)) is not None:
                yield batch
                if batch.finish_reason is not None:
                    return
            for attempt in range(self._scheduler.limits.max_attempts):
                with ExitStack() as stack:
                    feed, member = await self._submitted(stack)
                    while True:
                        await feed.wait()
                        batch = self._taken(feed, member.worker)
                        if batch.token_ids or batch.finish_reason is not None:
                            yield batch
                        if feed.end is not None:
                            break
                    if feed.end.finish_reason in _ENDED:
                        self._scheduler.lengths.saw(len(self._progress.sent))
                        return
                await self._after_broken_leg(feed.end, member, attempt)
            raise Unavailable("every attempt to decode the sequence broke", reason="attempts_exhausted")
        finally:
            self._give_up_lease()
            if turn is not None:
                turn.ended(len(self._progress.sent))
            self._poke()

    async def _turn(self) -> Turn | None:
        """Wait for leave to go to the workers; nothing is awaited from then until the first leg is charged."""
        gate, job = self._scheduler.gate, self._job
        if gate is None:
            return None
        prompt_tokens = len(job.prompt)
        uncached, prefill_ms = least_work(self._foresight.view(self._output_tokens), prompt_tokens)
        ticket = Ticket(
            request_id=job.request_id,
            arrived_s=job.arrived,
            deadline_s=job.deadline,
            tenant=job.caller.tenant,
            priority=job.caller.priority,
            weight=job.caller.weight,
            prompt_tokens=prompt_tokens,
            uncached_tokens=uncached,
            output_tokens=self._output_tokens,
            size_bytes=_BYTES_PER_TOKEN * prompt_tokens,
            ttft_slo_ms=job.caller.slo.ttft_ms,
            prefill_ms=prefill_ms,
        )
        turn = await gate.turn(ticket)
        self.record.held_ms = turn.waited_ms
        self._has_fresh_look = turn.waited_ms < _FRESH_MS
        return turn

    def _decide(self, *, may_prefill: bool) -> Decision:
        progress, job = self._progress, self._job
        generated = len(progress.sent)
        left = max(1, self._output_tokens - generated)
        request = SchedulingRequest(
            prompt_tokens=len(job.prompt) + generated,
            may_prefill=may_prefill,
            kv_connector=progress.lease.worker.kv_connector if progress.lease else None,
            held_by=progress.lease.worker.id if progress.lease else None,
            excluded=frozenset(progress.excluded),
            output_tokens=left,
            slo=job.caller.slo,
            waited_ms=(self._now() - job.arrived) * 1e3,
            session=job.caller.session,
            tenant=job.caller.tenant,
            priority=job.caller.priority,
        )
        # Who goes on with blocks that were just computed elsewhere is not chosen by its cache.
        is_known = self._has_fresh_look or progress.lease is not None
        view = self._foresight.view(left, generated, afresh=not is_known)
        self._has_fresh_look = False
        decision = self._scheduler.policy.choose(request, view)
        self.record.decisions.append(decision)
        return decision

    async def _prefilled(self) -> PrefillAnswer | None:
        """The answer of a prefill worker, or None when decode is to compute the prompt."""
        for _ in range(self._scheduler.limits.max_attempts):
            decision = self._decide(may_prefill=True)
            self.record.decision = decision.reason
            self.record.predicted_ttft_ms = decision.prediction.ttft_ms
            member = self._scheduler.fleet.get(decision.prefill) if decision.prefill else None
            if member is None or member.prefill is None:
                self._progress.decode = decision.decode
                break
            try:
                answer = await self._prefill_on(member)
            except OmniError as error:
                if error.code in _FINAL:
                    raise
                self._count_retry("prefill")
                self._progress.excluded.add(member.worker.id)
                continue
            self._scheduler.metrics.decisions.labels(decision.reason).inc()
            return answer
        self._scheduler.metrics.decisions.labels(self.record.decision).inc()
        return None

    async def _prefill_on(self, member: Member) -> PrefillAnswer:
        assert member.prefill is not None
        job, worker, foresight = self._job, member.worker, self._foresight
        keys = foresight.keys(worker.block_size)
        order = PrefillOrder(
            job.request_id,
            self._scheduler.model,
            job.prompt,
            job.sampling,
            keys,
            self._scheduler.proxy_id,
            foresight.uncached_tokens(worker),
        )
        computing = foresight.compute_on(worker, 0)
        leg_trace = self._trace.leg("proxy.prefill", foresight.attributes(worker))
        with foresight.mark(worker) as mark, computing, leg_trace as leg:
            answer = await member.prefill.prefill(order, self._left_s(), leg.headers)
            mark.computed()
            seen = computing.computed(answer.cached_tokens, answer.timings.queue_ms + answer.timings.compute_ms)
            leg.set({"omni.cached_tokens": answer.cached_tokens, "omni.queue_ms": answer.timings.queue_ms})
        self._poke()
        if seen is not None:
            self._scheduler.metrics.predicted("prefill", seen)
        self.record.predicted_cached_tokens = foresight.compare(worker, answer.cached_tokens)
        self.record.prefill_worker = worker.id
        self.record.cached_tokens = answer.cached_tokens
        self.record.queue_ms = answer.timings.queue_ms
        if answer.kv_handle is not None:
            self._progress.lease = _Lease(answer.kv_handle, worker, member.prefill.release)
        return answer

    def _first_batch(self, answer: PrefillAnswer) -> TokenBatch | None:
        """The prefill's token if it may stand; then decode goes on after it."""
        job, progress = self._job, self._progress
        finish = answer.finish_reason
        if finish is None and job.sampling.max_tokens == 1:
            finish = FinishReason.LENGTH
        if finish is None and answer.kv_handle is not None:
            progress.first_token = first_token_source(len(job.prompt), job.sampling, answer.kv_handle)
            if progress.first_token is not FirstToken.PREFILL:
                return None
        progress.first_token = FirstToken.PREFILL
        progress.sent.append(answer.first_token_id)
        self._count_first_token(FirstToken.PREFILL)
        return TokenBatch([answer.first_token_id], answer.logprobs, finish)

    async def _submitted(self, stack: ExitStack) -> tuple[Feed, Member]:
        """A feed of a decode worker that took the sequence; `stack` settles and aborts it."""
        last: OmniError | None = None
        give_up = asyncio.get_running_loop().time() + self._scheduler.limits.resume_timeout_s
        may_wait = bool(self._progress.sent or self._progress.lease or self.record.retries)
        while True:
            try:
                member = self._decode_member()
            except Unavailable as unavailable:
                if not may_wait or last is not None:
                    raise last or unavailable from None
                if self._progress.excluded:
                    # Nobody else is there: a worker that broke once is better than none.
                    self._progress.excluded.clear()
                else:
                    await self._fleet_change(give_up, unavailable)
                continue
            try:
                return self._submit_to(member, stack), member
            except OmniError as error:
                last = error
                self._progress.excluded.add(member.worker.id)

    def _decode_member(self) -> Member:
        """The decode worker decided on, or another one if that takes no work any more."""
        progress, fleet = self._progress, self._scheduler.fleet
        chosen, progress.decode = progress.decode, None
        member = fleet.get(chosen) if chosen and chosen not in progress.excluded else None
        if member is None or member.refusal is not None:
            member = fleet.get(self._decide(may_prefill=False).decode)
        if member is None or member.decode is None:
            raise Unavailable("the chosen decode worker has left", reason="no_decode_worker")
        return member

    async def _fleet_change(self, give_up: float, unavailable: Unavailable) -> None:
        try:
            async with asyncio.timeout_at(min(give_up, self._job.deadline)):
                await self._scheduler.fleet.changed()
        except TimeoutError:
            raise unavailable from None

    def _submit_to(self, member: Member, stack: ExitStack) -> Feed:
        assert member.decode is not None
        job, progress, worker, decode = self._job, self._progress, member.worker, member.decode
        lease = progress.lease
        handle = lease.handle if lease and lease.worker.kv_connector == worker.kv_connector else None
        is_pull = handle is not None and len(progress.sent) <= 1
        after = continuation(job.prompt, progress.sent, job.sampling, progress.first_token)
        attributes = {"omni.worker_id": worker.id} if is_pull else self._foresight.attributes(worker)
        leg = stack.enter_context(self._trace.leg("proxy.decode", attributes))
        generated, left = len(progress.sent), max(1, self._output_tokens - len(progress.sent))
        if is_pull:
            progress.computing = None
            progress.charge = stack.enter_context(self._scheduler.fleet.ledger.charge(worker.id, None, left))
        else:
            progress.computing = stack.enter_context(self._foresight.compute_on(worker, left, generated))
            progress.charge = progress.computing.charge
        feed = decode.submit(
            Submission(
                request_id=job.request_id,
                model=self._scheduler.model,
                token_ids=after.token_ids,
                num_output_tokens=after.num_output_tokens,
                sampling=after.sampling,
                kv_handle=handle if is_pull else None,
                traceparent=leg.headers.get("traceparent", ""),
                deadline_ms=max(1, int(self._left_s() * 1000)),
                uncached_tokens=0 if is_pull else self._foresight.uncached_tokens(worker, generated),
            )
        )
        stack.callback(decode.abort, feed)
        progress.mark = None if is_pull else stack.enter_context(self._foresight.mark(worker))
        self.record.decode_worker = worker.id
        return feed

    def _taken(self, feed: Feed, worker: Worker) -> TokenBatch:
        tokens, rows = feed.take()
        if feed.start is not None:
            self._note_start(feed, worker)
        if tokens:
            if not self._progress.sent:
                self._count_first_token(self._progress.first_token)
            self._progress.sent.extend(tokens)
            if self._progress.charge is not None:
                self._progress.charge.received(len(tokens))
        finish = feed.end.finish_reason if feed.end is not None else None
        return TokenBatch(tokens, rows, finish if finish in _ENDED else None)

    def _note_start(self, feed: Feed, worker: Worker) -> None:
        """The pull is over: the holder has freed the blocks, or the worker did without them."""
        start, feed.start = feed.start, None
        assert start is not None
        record, progress = self.record, self._progress
        self._learn(start, worker)
        if progress.lease is None and not progress.sent:
            record.cached_tokens = start.cached_tokens
            record.predicted_cached_tokens = self._foresight.compare(worker, start.cached_tokens)
        if progress.lease is not None and start.fell_back:
            record.fell_back = True
            self._give_up_lease()
        progress.lease = None
        record.queue_ms += start.timings.queue_ms
        record.transfer_ms += start.timings.transfer_ms
        if progress.mark is not None:
            progress.mark.computed()
        else:
            self._foresight.pulled(worker)

    def _learn(self, start: SequenceStart, worker: Worker) -> None:
        """What the leg's first words say of the workers' times."""
        fleet, progress, timings = self._scheduler.fleet, self._progress, start.timings
        if progress.computing is not None:
            seen = progress.computing.computed(start.cached_tokens, timings.queue_ms + timings.compute_ms)
            self._poke()
            if seen is not None:
                self._scheduler.metrics.predicted("prefill", seen)
        elif progress.lease is not None and start.pulled_tokens and not start.fell_back:
            holder = progress.lease.worker.id
            slots = fleet.columns.get(holder), fleet.columns.get(worker.id)
            if slots[0] is not None and slots[1] is not None:
                moved = fleet.times.saw_transfer(slots[0], slots[1], start.pulled_tokens, timings.transfer_ms)
                if moved is not None:
                    self._scheduler.metrics.predicted("transfer", moved)

    def _poke(self) -> None:
        if self._scheduler.gate is not None:
            self._scheduler.gate.poke()

    async def _after_broken_leg(self, end: End, member: Member, attempt: int) -> None:
        """Make ready for another attempt, or raise what must not be tried again."""
        error = end.error or Unavailable(f"the engine ended the sequence: {end.finish_reason}", reason="engine_error")
        if error.code in _FINAL:
            raise error
        self._progress.excluded.add(member.worker.id)
        if end.rejected and not self._another_decode():
            if not self._progress.sent:
                raise error
            # The client has a token: a full worker is asked again rather than the stream ended.
            await asyncio.sleep(_PAUSE_S * 4**attempt)
        if self._progress.sent:
            self.record.resumes += 1
            self._scheduler.metrics.resumes.inc()
        else:
            self._count_retry("decode")

    def _another_decode(self) -> bool:
        try:
            self._decide(may_prefill=False)
        except Unavailable:
            return False
        return True

    def _count_first_token(self, source: FirstToken) -> None:
        self.record.first_token_source = source
        self._scheduler.metrics.first_tokens.labels(source).inc()

    def _count_retry(self, leg: str) -> None:
        self.record.retries += 1
        self._scheduler.metrics.retries.labels(leg).inc()

    def _give_up_lease(self) -> None:
        lease, self._progress.lease = self._progress.lease, None
        if lease is not None:
            lease.release(lease.handle.lease_id)
            self._scheduler.metrics.releases.inc()

    def _left_s(self) -> float:
        left = self._job.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded("the request's time is over", reason="deadline")
        return left


def check_room(prompt_tokens: int, max_model_len: int | None, field: str) -> None:
    """Raises `InvalidRequest` when no token can follow the prompt."""
    if max_model_len is not None and prompt_tokens >= max_model_len:
        message = f"the prompt has {prompt_tokens} tokens; the model holds {max_model_len} with the answer"
        raise InvalidRequest(message, field=field, reason="context_length_exceeded")
