"""What all legs of one sequence share: how far it has come, what it holds, and how its next workers are chosen."""

import asyncio
import time
from dataclasses import dataclass, replace

from omni_common.errors import Code, DeadlineExceeded
from omni_proxy.continuation import FirstToken, first_token_source
from omni_proxy.explain import span_attributes
from omni_proxy.feed import Feed
from omni_proxy.foresight import Foresight
from omni_proxy.ports import KvHandle, PrefillPort
from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView
from omni_proxy.sequence import Scheduler, SequenceJob, SequenceRecord
from omni_proxy.tracing import RequestTrace
from omni_proxy.worker import Worker

FINAL = frozenset({Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNAUTHENTICATED, Code.DEADLINE_EXCEEDED})
"""Errors that another worker would answer alike."""


@dataclass(slots=True)
class Lease:
    """Blocks that wait on a prefill worker, until decode has pulled them or they are given up.

    `reader` is the sequence on the decode worker that was to pull them.
    """

    handle: KvHandle
    worker: Worker
    port: PrefillPort
    reader: Feed | None = None

    @property
    def is_told(self) -> bool:
        """A decode worker knows of them and may be reading, even if nothing is heard of it. It ends the lease itself.

        Blocks freed under its hands would be another request's by the time it reads them.
        """
        return self.reader is not None and not self.reader.is_unsent


class Course:
    """Of one sequence. `sent` are the tokens the client has or is about to have."""

    def __init__(self, scheduler: Scheduler, job: SequenceJob, trace: RequestTrace) -> None:
        self.scheduler = scheduler
        self.job = job
        self.trace = trace
        self.now = asyncio.get_running_loop().time
        metrics = scheduler.metrics.prefix
        self.foresight = Foresight(
            job.prompt, scheduler.keys, scheduler.fleet, metrics, self.now, job.cache_salt, job.adapter
        )
        self.output_tokens = scheduler.lengths.expect(job.sampling.max_tokens)
        self.has_fresh_look = False
        """The caches were just looked at."""
        self.fresh_view: FleetView | None = None
        """Of this very moment, for the next decision."""
        self.record = SequenceRecord()
        self.sent: list[int] = []
        self.lease: Lease | None = None
        self.first_token = FirstToken.DECODE_ALONE
        self.weights: str | None = None
        """What the client's last tokens were computed with."""
        self.excluded: set[str] = set()
        """Workers that failed it, and are not to be asked again soon."""

    def decide(self, *, may_prefill: bool, beside: str | None = None) -> Decision:
        """Choose workers as things are now; `beside` is left out too. Raises `Unavailable` when none decodes."""
        started = time.perf_counter()
        job, lease = self.job, self.lease
        generated = len(self.sent)
        left = max(1, self.output_tokens - generated)
        request = SchedulingRequest(
            prompt_tokens=len(job.prompt) + generated,
            may_prefill=may_prefill,
            kv_connector=lease.worker.kv_kind(job.adapter) if lease else None,
            held_by=lease.worker.id if lease else None,
            excluded=frozenset(self.excluded if beside is None else {*self.excluded, beside}),
            output_tokens=left,
            slo=job.caller.slo,
            waited_ms=(self.now() - job.arrived) * 1e3,
            session=job.caller.session,
            adapter=job.adapter,
            tenant=job.caller.tenant,
            priority=job.caller.priority,
        )
        view, self.fresh_view = self.fresh_view, None
        if view is None:
            # Who goes on with blocks that were just computed elsewhere is not chosen by its cache.
            is_known = self.has_fresh_look or lease is not None
            view = self.foresight.view(left, generated, afresh=not is_known)
        self.has_fresh_look = False
        decision = self.scheduler.policy.choose(request, view)
        if job.adapter:
            decision = replace(decision, adapter=job.adapter)
        if decision.prefill is not None and self._decode_draws_first(decision.prefill):
            decision = replace(decision, prediction=replace(decision.prediction, decode_draws_first=True))
        self.record.decided(decision, time.perf_counter() - started)
        self.trace.event("omni.decision", lambda: span_attributes(decision))
        return decision

    def _decode_draws_first(self, prefill: str) -> bool:
        member = self.scheduler.fleet.get(prefill)
        if member is None or self.job.sampling.max_tokens == 1:
            return False
        block_size = member.worker.block_size
        return first_token_source(len(self.job.prompt), self.job.sampling, block_size) is not FirstToken.PREFILL

    def poke(self) -> None:
        """Something changed that others may wait for."""
        if self.scheduler.gate is not None:
            self.scheduler.gate.poke()

    def answered_by(self, worker: Worker) -> None:
        """It gives tokens from here on; with other weights than before they are not what would have come."""
        weights = worker.weights_of(self.job.adapter)
        if self.weights not in (None, weights):
            self.note_inexact()
        self.weights = weights

    def note_inexact(self) -> None:
        """Counted once."""
        if self.record.is_resume_exact:
            self.record.is_resume_exact = False
            self.scheduler.metrics.health.inexact.inc()

    def count_first_token(self, source: FirstToken) -> None:
        self.record.first_token_source = source
        self.record.first_token_ms = (self.now() - self.job.arrived) * 1e3
        self.scheduler.metrics.first_tokens.labels(source).inc()

    def count_retry(self, leg: str) -> None:
        self.record.retries += 1
        self.scheduler.metrics.retries.labels(leg).inc()

    def give_up_lease(self) -> None:
        """Nobody else will be told of the blocks."""
        lease, self.lease = self.lease, None
        if lease is not None and not lease.is_told:
            lease.port.release(lease.handle.lease_id)
            self.scheduler.metrics.releases.inc()

    def left_s(self) -> float:
        """Until the deadline. Raises `DeadlineExceeded`."""
        left = self.job.deadline - self.now()
        if left <= 0:
            raise DeadlineExceeded("the request's time is over", reason="deadline")
        return left
