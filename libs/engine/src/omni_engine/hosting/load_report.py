"""What the router did, to the placement service: one report per interval, none of them counted twice.

expert_load -> gathered -> sent, until the service confirms it; a retry carries the same steps, so the service knows it
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from omni.placement.v1 import placement_service_pb2 as pb
from omni_common.errors import OmniError
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.bounded import bounded
from omni_engine.hosting.settings import EngineRole
from omni_engine.ports import Engine, ExpertLoad

log = logging.getLogger(__name__)

MAX_MERGED = 12
_REPORT_TIMEOUT_S = 5.0
_ENGINE_TIMEOUT_S = 10.0
_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
)
_PHASES: Mapping[EngineRole, pb.Phase] = {"prefill": pb.PHASE_PREFILL, "decode": pb.PHASE_DECODE}


@dataclass(frozen=True, slots=True)
class Window:
    """Load of engine steps `first_step` to `last_step`, and the tokens of prompts and answers in it."""

    load: ExpertLoad
    first_step: int
    last_step: int
    prompt_tokens: int
    generated_tokens: int
    num_merged: int = 1


def merged(earlier: Window, later: Window) -> Window:
    """Both as one. What ranks computed adds up only under one layout; else the later layout's is kept."""
    one, two = earlier.load, later.load
    ranks = two.rank_tokens
    if ranks is not None and one.rank_tokens is not None and one.layout_version == two.layout_version:
        ranks = one.rank_tokens + ranks
    load = ExpertLoad(
        one.tokens + two.tokens,
        ranks,
        two.layout_version,
        one.steps + two.steps,
        one.duration_ms + two.duration_ms,
        one.routed_tokens + two.routed_tokens,
    )
    return Window(
        load,
        earlier.first_step,
        later.last_step,
        earlier.prompt_tokens + later.prompt_tokens,
        earlier.generated_tokens + later.generated_tokens,
        earlier.num_merged + later.num_merged,
    )


class LoadReporter:
    """Reports one engine's load for ever; never fails with the service or the engine.

    Steps are counted on from `first_step`, which must grow with every start of the worker. Of an outage's load the
    newest `MAX_MERGED` intervals are kept, as one window.
    """

    def __init__(
        self, stub: Any, engine: Engine, admission: Admission, template: pb.ReportLoadRequest, interval_s: float,
        first_step: int,
    ) -> None:  # fmt: skip
        """`template` names model, group, worker and traffic class."""
        self._stub, self._engine, self._admission, self._template = stub, engine, admission, template
        self._interval_s = interval_s
        self._next_step = first_step
        self._seen = (0, 0)
        self._gathered: Window | None = None
        self._sent: Window | None = None
        self._refusal = ""
        self.outcomes: Counter[str] = Counter()
        self.rank_imbalance = 0.0

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self._gather()
            await self._deliver()

    async def _gather(self) -> None:
        try:
            load = await bounded(self._engine.expert_load(), _ENGINE_TIMEOUT_S)
        except OmniError as error:
            self.outcomes["unread"] += 1
            log.warning("the engine's expert load was not read", extra={"error": error.message})
            return
        stats = self._engine.stats()
        prompt, generated = stats.computed_prompt_tokens - self._seen[0], stats.generated_tokens - self._seen[1]
        self._seen = stats.computed_prompt_tokens, stats.generated_tokens
        if load is None or not load.steps:
            return
        window = Window(load, self._next_step, self._next_step + load.steps - 1, prompt, generated)
        self._next_step += load.steps
        self._measure(load)
        if self._gathered is not None and self._gathered.num_merged >= MAX_MERGED:
            self.outcomes["dropped"] += 1
            self._gathered = None
        self._gathered = window if self._gathered is None else merged(self._gathered, window)

    async def _deliver(self) -> None:
        """Send what is unconfirmed, then what has gathered since."""
        while window := self._sent or self._gathered:
            if window is self._gathered:
                self._sent, self._gathered = window, None
            try:
                await self._stub.ReportLoad(iter([self._request(window)]), timeout=_REPORT_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _REFUSALS:
                    self.outcomes["undelivered"] += 1
                    return
                self._refused(error)
            except (grpc.aio.UsageError, asyncio.InvalidStateError):
                self.outcomes["undelivered"] += 1
                return
            else:
                self.outcomes["delivered"] += 1
                self._refusal = ""
            self._sent = None

    def _request(self, window: Window) -> pb.ReportLoadRequest:
        load = window.load
        request = pb.ReportLoadRequest(
            first_step=window.first_step,
            last_step=window.last_step,
            load=pb.ExpertLoad(
                num_layers=load.tokens.shape[0], num_experts=load.tokens.shape[1], tokens=load.tokens.ravel().tolist()
            ),
            phase=self._phase(window),
            layout_version=load.layout_version,
            tokens=load.routed_tokens,
            duration_ms=load.duration_ms,
            rank_tokens=load.rank_tokens.ravel().tolist() if load.rank_tokens is not None else (),
        )
        request.MergeFrom(self._template)
        return request

    def _phase(self, window: Window) -> pb.Phase:
        """By the worker's role; a worker of both legs did what most of the window's tokens were."""
        is_prompts = window.prompt_tokens > window.generated_tokens
        return _PHASES.get(self._admission.role, pb.PHASE_PREFILL if is_prompts else pb.PHASE_DECODE)

    def _measure(self, load: ExpertLoad) -> None:
        """Slowest over mean rank, summed over the layers."""
        if load.rank_tokens is not None and (mean := load.rank_tokens.mean(axis=1).sum()):
            self.rank_imbalance = float(np.max(load.rank_tokens, axis=1).sum() / mean)

    def _refused(self, error: grpc.aio.AioRpcError) -> None:
        """A report that the service will never take is not sent again; said once per reason."""
        self.outcomes["refused"] += 1
        refusal = f"{error.code().name}: {error.details()}"
        if refusal != self._refusal:
            self._refusal = refusal
            log.warning("placement refuses load reports", extra={"detail": refusal})
