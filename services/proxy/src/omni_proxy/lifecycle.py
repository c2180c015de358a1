"""The life of one sequence: choose workers, prefill, decode; try again elsewhere; leave nothing behind.

turn -> decide -> prefill p -> first token out -> submit to d -> tokens ... finish
          ^          | fails, is late: another p    ^    | leg breaks or goes quiet
          +----------+ or decode computes alone     +----+ another d, from prompt + tokens sent
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

from omni_common.errors import InvalidRequest, ResourceExhausted, Unavailable
from omni_proxy.continuation import FirstToken, first_token_source
from omni_proxy.course import Course
from omni_proxy.decoding import ENDED, Decoding
from omni_proxy.feed import Show
from omni_proxy.flow.gate import Turn
from omni_proxy.flow.ticket import Ticket
from omni_proxy.give_way import give_way
from omni_proxy.ports import FinishReason, PrefillAnswer
from omni_proxy.prefilling import Prefilling
from omni_proxy.room import least_work
from omni_proxy.scheduling.decision import Decision
from omni_proxy.sequence import Scheduler, SequenceJob, SequenceRecord, TokenBatch
from omni_proxy.tracing import RequestTrace

_BYTES_PER_TOKEN = 8
_FRESH_MS = 1.0


class SequenceRun:
    """Runs one sequence. Close the iterator of `stream` to abort it: both legs are freed then."""

    def __init__(self, scheduler: Scheduler, job: SequenceJob, trace: RequestTrace) -> None:
        self._course = Course(scheduler, job, trace)
        self._decoding = Decoding(self._course)

    @property
    def record(self) -> SequenceRecord:
        return self._course.record

    async def stream(self, show: Show | None = None) -> AsyncGenerator[TokenBatch, None]:
        """Token batches until one has a finish reason; `show` may take tokens that come between two batches.

        Raises:
            OmniError: no worker could run the sequence, or go on with it.
        """
        course, turn = self._course, None
        try:
            turn = await self._turn()
            answer = await Prefilling(course).answer()
            if isinstance(answer, Decision):
                self._decoding.chosen, self._decoding.predicted_ms = answer.decode, answer.prediction.computed_ms
            elif (batch := self._first_batch(answer)) is not None:
                yield batch
                if batch.finish_reason is not None:
                    return
            async with aclosing(self._decoded(show)) as batches:
                async for batch in batches:
                    yield batch
        except (Unavailable, ResourceExhausted) as error:
            gate = course.scheduler.gate
            # A leg that broke does not say when to come again; a worker that is full need not.
            is_refusal = error.retry_after_s is not None or isinstance(error, ResourceExhausted)
            if gate is not None and turn is not None and not course.sent and is_refusal:
                gate.refused(turn, error)
            raise
        finally:
            course.record.ended((course.now() - course.job.arrived) * 1e3, len(course.sent))
            course.give_up_lease()
            if turn is not None:
                turn.ended(len(course.sent))
            course.poke()

    def sent(self, tokens: Sequence[int]) -> None:
        """Of a `Show`: it has taken these."""
        self._decoding.sent(tokens)

    async def _decoded(self, show: Show | None) -> AsyncGenerator[TokenBatch, None]:
        """One leg after another. As many in a row as the limits say may end without a token."""
        course, decoding, fruitless = self._course, self._decoding, 0
        while fruitless < course.scheduler.limits.max_attempts:
            had = len(course.sent)
            with ExitStack() as stack:
                feed, member = await decoding.submitted(stack)
                await decoding.first(feed)
                while True:
                    end = feed.end  # as of this batch: more may come while a slow client takes it
                    batch = decoding.taken(feed, member.worker)
                    if batch.token_ids or batch.finish_reason is not None:
                        yield batch
                    if end is not None:
                        break
                    feed.show = None if decoding.left_out else show
                    await feed.wait()
                if end.finish_reason in ENDED:
                    course.scheduler.lengths.saw(len(course.sent))
                    return
                decoding.tell_health(end)
            fruitless = 0 if len(course.sent) > had else fruitless + 1
            await decoding.after_broken_leg(end, member, fruitless)
        raise Unavailable("every attempt to decode the sequence broke", reason="attempts_exhausted")

    async def _turn(self) -> Turn | None:
        """Wait for leave to go to the workers; nothing is awaited from then until the first leg is charged."""
        course, job = self._course, self._course.job
        gate = course.scheduler.gate
        if gate is None:
            return None
        prompt_tokens = len(job.prompt)
        course.foresight.prepare()
        await give_way()
        view = course.foresight.view(course.output_tokens)
        uncached, prefill_ms = least_work(view, prompt_tokens)
        ticket = Ticket(
            request_id=job.request_id,
            arrived_s=job.arrived,
            deadline_s=job.deadline,
            tenant=job.caller.tenant,
            priority=job.caller.priority,
            weight=job.caller.weight,
            prompt_tokens=prompt_tokens,
            uncached_tokens=uncached,
            output_tokens=course.output_tokens,
            size_bytes=_BYTES_PER_TOKEN * prompt_tokens,
            ttft_slo_ms=job.caller.slo.ttft_ms,
            itl_slo_ms=job.caller.slo.itl_ms,
            prefill_ms=prefill_ms,
            adapter=job.adapter,
        )
        turn = await gate.turn(ticket)
        course.record.held_ms = turn.waited_ms
        course.has_fresh_look = turn.waited_ms < _FRESH_MS
        course.fresh_view = None if turn.has_waited else view
        return turn

    def _first_batch(self, answer: PrefillAnswer) -> TokenBatch | None:
        """The prefill's token if it may stand; then decode goes on after it."""
        course, job = self._course, self._course.job
        finish = answer.finish_reason
        if finish is None and job.sampling.max_tokens == 1:
            finish = FinishReason.LENGTH
        if finish is None and answer.kv_handle is not None:
            course.first_token = first_token_source(len(job.prompt), job.sampling, answer.kv_handle.block_size)
            if course.first_token is not FirstToken.PREFILL:
                return None
        course.first_token = FirstToken.PREFILL
        if course.lease is not None:
            course.answered_by(course.lease.worker)
        course.sent.append(answer.first_token_id)
        course.count_first_token(FirstToken.PREFILL)
        return TokenBatch([answer.first_token_id], answer.logprobs, finish)


def check_room(prompt_tokens: int, max_model_len: int | None, field: str) -> None:
    """Raises `InvalidRequest` when no token can follow the prompt."""
    if max_model_len is not None and prompt_tokens >= max_model_len:
        message = f"the prompt has {prompt_tokens} tokens; the model holds {max_model_len} with the answer"
        raise InvalidRequest(message, field=field, reason="context_length_exceeded")
