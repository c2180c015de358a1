"""PrefillService over an engine: one prompt in, its first token and a lease on its blocks out."""

import asyncio
import time
from typing import Any

from opentelemetry import trace

from omni.prefill.v1.prefill_service_pb2 import (
    PrefillRequest,
    PrefillResponse,
    ReleaseKvRequest,
    ReleaseKvResponse,
)
from omni.prefill.v1.prefill_service_pb2_grpc import PrefillServiceServicer
from omni_common.errors import InvalidRequest
from omni_engine.hosting.accounts import Accounts
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.background import Background
from omni_engine.hosting.identity import Identity
from omni_engine.hosting.metrics import WorkerMetrics
from omni_engine.hosting.wire import (
    FINISH_REASONS,
    handle_to_wire,
    logprobs_to_wire,
    require_tokens,
    sampling_from_wire,
    timings_to_wire,
)
from omni_engine.ports import Engine, PrefillJob, PrefillResult


class PrefillServicer(PrefillServiceServicer):
    """Wire edge of `Engine.prefill` and `Engine.release`."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        accounts: Accounts,
        background: Background,
        metrics: WorkerMetrics,
        identity: Identity,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._accounts = accounts
        self._background = background
        self._metrics = metrics
        self._identity = identity

    async def Prefill(self, request: PrefillRequest, context: Any) -> PrefillResponse:
        self._admission.check(request.model, "prefill", request.adapter)
        job = _job(request)
        started_s = time.monotonic()
        with self._admission.slot(), self._accounts.prefill(request.proxy_id, job.believed_tokens) as share:
            result = await self._run(job)
            share.computed(len(job.token_ids) - result.cached_tokens)
        elapsed_s = time.monotonic() - started_s
        self._admission.observe(elapsed_s)
        self._metrics.prefill_done(elapsed_s, len(job.token_ids), result.cached_tokens)
        self._describe(trace.get_current_span(), job, result)
        self._release_if_undelivered(context, result)
        return self._response(result)

    async def ReleaseKv(self, request: ReleaseKvRequest, context: Any) -> ReleaseKvResponse:
        if not self._admission.is_ready:
            return ReleaseKvResponse(released=False)
        return ReleaseKvResponse(released=await self._engine.release(request.lease_id))

    async def _run(self, job: PrefillJob) -> PrefillResult:
        try:
            return await self._engine.prefill(job)
        except asyncio.CancelledError:
            # The engine frees what a cancelled call held; an abort by name could hit a retry of the same request.
            self._metrics.aborted("prefill_cancelled")
            raise

    def _release_if_undelivered(self, context: Any, result: PrefillResult) -> None:
        """A caller that left while the answer was on its way will never pull the blocks."""
        handle = result.kv_handle
        if handle is None:
            return

        def on_done(call: Any) -> None:
            if call.cancelled():
                self._background.spawn(self._engine.release(handle.lease_id), "release-undelivered")

        context.add_done_callback(on_done)

    def _describe(self, span: trace.Span, job: PrefillJob, result: PrefillResult) -> None:
        if not span.is_recording():
            return
        prompt = len(job.token_ids)
        span.set_attributes(
            {
                "omni.worker_id": self._identity.worker_id,
                "omni.request_id": job.request_id,
                "omni.prompt_tokens": prompt,
                "omni.cached_tokens": result.cached_tokens,
                "omni.uncached_tokens": prompt - result.cached_tokens,
                "omni.queue_ms": result.timings.queue_ms,
                "omni.compute_ms": result.timings.compute_ms,
            }
        )
        if job.adapter:
            span.set_attribute("omni.adapter", job.adapter)

    def _response(self, result: PrefillResult) -> PrefillResponse:
        response = PrefillResponse(
            first_token_id=result.first_token_id,
            cached_tokens=result.cached_tokens,
            timings=timings_to_wire(result.timings),
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
        )
        if result.finish_reason is not None:
            response.finish_reason = FINISH_REASONS[result.finish_reason]
        if result.kv_handle is not None:
            response.kv_handle.CopyFrom(handle_to_wire(result.kv_handle))
        if result.logprobs is not None:
            response.logprobs.CopyFrom(logprobs_to_wire(result.logprobs))
        return response


def _job(request: PrefillRequest) -> PrefillJob:
    if not request.request_id:
        raise InvalidRequest("request_id must not be empty", field="request_id")
    tokens = require_tokens(request.token_ids)
    uncached = request.uncached_tokens if request.HasField("uncached_tokens") else None
    return PrefillJob(
        request.request_id,
        tokens,
        sampling_from_wire(request.sampling),
        request.cache_salt,
        uncached,
        adapter=request.adapter,
    )
