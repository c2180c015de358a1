"""WorkerService: what the worker is, how loaded it is, and how it is emptied."""

import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from omni.engine.v1.engine_pb2 import WorkerInfo
from omni.engine.v1.worker_service_pb2 import (
    DescribeRequest,
    DescribeResponse,
    DrainRequest,
    DrainResponse,
    ListBlocksRequest,
    ListBlocksResponse,
    SetRoleRequest,
    SetRoleResponse,
    WatchStatsRequest,
    WatchStatsResponse,
)
from omni.engine.v1.worker_service_pb2_grpc import WorkerServiceServicer
from omni_common.errors import FailedPrecondition, InvalidRequest, Unavailable
from omni_engine.hosting.accounts import Accounts
from omni_engine.hosting.admission import Admission
from omni_engine.hosting.identity import Identity
from omni_engine.hosting.mirror import BlockMirror
from omni_engine.hosting.settings import DRAFTER_LABEL, EngineRole
from omni_engine.hosting.wire import MEDIA, ROLES, info_to_wire, role_from_wire
from omni_engine.ports import Engine, EngineStats

log = logging.getLogger(__name__)

_DEFAULT_INTERVAL_MS = 50
_SHORTEST_INTERVAL_MS = 10
_LONGEST_SILENCE_S = 1.0
_LEASE_POLL_S = 0.05
_ANSWER_MARGIN_S = 0.2
_BLOCKS_PER_PAGE = 16_384


class Worker:
    """One engine in its cluster: describes itself, reports load, changes its role, drains."""

    def __init__(self, engine: Engine, admission: Admission, accounts: Accounts, identity: Identity) -> None:
        self._engine = engine
        self._admission = admission
        self._accounts = accounts
        self._identity = identity

    def describe(self) -> WorkerInfo:
        """Raises Unavailable until the engine is loaded."""
        if not self._admission.is_ready:
            raise Unavailable("the engine is not ready", reason="loading", retry_after_s=1.0)
        identity, layout = self._identity, self._engine.expert_layout()
        return info_to_wire(
            self._engine.info,
            identity.worker_id,
            identity.address,
            self._admission.role,
            identity.epoch,
            self._labels(),
            layout.version if layout else 0,
        )

    def _labels(self) -> dict[str, str]:
        drafter = self._engine.info.speculative
        return {**self._identity.labels, **({DRAFTER_LABEL: drafter} if drafter else {})}

    def stats(self) -> EngineStats | None:
        """None until the engine is loaded."""
        return self._engine.stats() if self._admission.is_ready else None

    @property
    def leases(self) -> int:
        stats = self.stats()
        return stats.leases if stats else 0

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait until nothing runs and no lease is held; False when the time is up first."""
        self._admission.set_draining(True)
        until_s = time.monotonic() + timeout_s
        while self._admission.active or self.leases:
            remaining_s = until_s - time.monotonic()
            if remaining_s <= 0 or not self._admission.is_draining:
                return False
            await self._admission.changed(min(remaining_s, _LEASE_POLL_S))
        return True

    def resume(self) -> None:
        self._admission.set_draining(False)

    def set_role(self, role: EngineRole) -> EngineRole:
        """Take the legs of this role; returns the role until now.

        Raises:
            Unavailable: the engine is not loaded.
            FailedPrecondition: the engine was started for its role only.
        """
        if not self._admission.is_ready:
            raise Unavailable("the engine is not ready", reason="loading", retry_after_s=1.0)
        previous = self._admission.role
        if role == previous:
            return previous
        if self._engine.info.fixed_role:
            raise FailedPrecondition(self._engine.info.fixed_role, reason="role_fixed")
        self._admission.set_role(role)
        log.info("role changed", extra={"role": role, "previous": previous, "running": self._admission.active})
        return previous

    def load(self, proxy_id: str = "") -> WatchStatsResponse:
        """What the worker has to do; `others_*` is the work of all but this proxy."""
        stats, others = self.stats() or EngineStats(), self._accounts.others(proxy_id)
        computed = self._accounts.computed
        return WatchStatsResponse(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            running=stats.running,
            waiting=stats.waiting,
            queued_tokens=stats.queued_tokens,
            kv_usage=stats.kv_usage,
            leases=stats.leases,
            step_ms=stats.step_ms,
            draining=self._admission.is_draining,
            generated_tokens=stats.generated_tokens,
            computed_prompt_tokens=stats.computed_prompt_tokens,
            others_prefills=others.prefills,
            others_uncached_tokens=others.uncached_tokens,
            others_sequences=others.sequences,
            context_tokens=stats.context_tokens,
            steps=stats.steps,
            busy_ms=stats.busy_ms,
            role=ROLES[self._admission.role],
            prompts=computed.prompts,
            prompt_tokens=computed.tokens,
            prompt_busy_ms=computed.busy_s * 1e3,
            adapters=stats.adapters,
        )


class WorkerServicer(WorkerServiceServicer):
    """Wire edge of `Worker`; `drain_timeout_s` holds where a caller of Drain sets no deadline.

    `mirror` gives the blocks the engine holds, None where nobody follows its events.
    """

    def __init__(
        self,
        worker: Worker,
        admission: Admission,
        drain_timeout_s: float,
        mirror: Callable[[], BlockMirror | None],
    ) -> None:
        self._worker = worker
        self._admission = admission
        self._drain_timeout_s = drain_timeout_s
        self._mirror = mirror

    async def Describe(self, request: DescribeRequest, context: Any) -> DescribeResponse:
        return DescribeResponse(info=self._worker.describe())

    async def WatchStats(self, request: WatchStatsRequest, context: Any) -> AsyncIterator[WatchStatsResponse]:
        interval_s = max(_SHORTEST_INTERVAL_MS, request.min_interval_ms or _DEFAULT_INTERVAL_MS) / 1e3
        last, sent_s = None, 0.0
        while True:
            # As told: what changes while a report is on its way is news.
            told = self._admission.role, self._admission.is_draining
            load, now_s = self._worker.load(request.proxy_id), time.monotonic()
            if load != last or now_s - sent_s >= _LONGEST_SILENCE_S:
                yield load
                last, sent_s = load, now_s
            await self._pause(interval_s, told)

    async def SetRole(self, request: SetRoleRequest, context: Any) -> SetRoleResponse:
        if (role := role_from_wire(request.role)) is None:
            raise InvalidRequest("a worker's role is prefill, decode or both", field="role")
        previous = self._worker.set_role(role)
        return SetRoleResponse(role=request.role, previous=ROLES[previous])

    async def ListBlocks(self, request: ListBlocksRequest, context: Any) -> AsyncIterator[ListBlocksResponse]:
        epoch = self._worker.describe().epoch
        mirror = self._mirror()
        if mirror is None:
            raise FailedPrecondition("this worker has no kvstore, so it mirrors no blocks", reason="no_mirror")
        is_empty = True
        for medium, blocks in mirror.pages(_BLOCKS_PER_PAGE):
            keys = b"".join(block.key for block in blocks)
            yield ListBlocksResponse(epoch=epoch, medium=MEDIA[medium], block_keys=keys)
            is_empty = False
        if is_empty:
            yield ListBlocksResponse(epoch=epoch)

    async def Drain(self, request: DrainRequest, context: Any) -> DrainResponse:
        if request.resume:
            self._worker.resume()
            return DrainResponse(drained=False, running=self._admission.active, leases=self._worker.leases)
        remaining_s = context.time_remaining()
        limit_s = self._drain_timeout_s if remaining_s is None else max(0.0, remaining_s - _ANSWER_MARGIN_S)
        drained = await self._worker.drain(limit_s)
        return DrainResponse(drained=drained, running=self._admission.active, leases=self._worker.leases)

    async def _pause(self, interval_s: float, told: tuple[EngineRole, bool]) -> None:
        """An interval; a role or draining other than `told` ends it early."""
        admission, until_s = self._admission, time.monotonic() + interval_s
        while (admission.role, admission.is_draining) == told and (left_s := until_s - time.monotonic()) > 0:
            await admission.changed(left_s)
