"""What follows when a layout does not get into an engine, a rank fails, or a person wants an earlier layout back."""

import logging
from dataclasses import replace

from omni_common.errors import InvalidRequest, NotFound, OmniError
from omni_placement.book import Exclusions, LayoutBook, Outcome, Published
from omni_placement.load.book import GroupName
from omni_placement.metrics import Metrics
from omni_placement.outlines import same_outline
from omni_placement.planning import Planner
from omni_placement.rollout import Rollout
from omni_placement.session import Ack, Failure
from omni_placement.unbroken import Unbroken

log = logging.getLogger(__name__)
ROLLED_BACK = "rolled_back"


class Recovery:
    """Takes acks; what failed goes back to the layout before it, or is planned anew without the ranks that failed."""

    def __init__(self, layouts: LayoutBook, rollout: Rollout, planner: Planner, metrics: Metrics) -> None:
        self._layouts, self._rollout, self._planner, self._metrics = layouts, rollout, planner, metrics
        self._work = Unbroken()

    async def ack(self, ack: Ack) -> None:
        """Take a worker's word on its order.

        Raises:
            FailedPrecondition: this worker has no such order under way; or the ranks that failed held the last copy of
                an expert, which nothing here can bring back.
            InvalidRequest: a version or a count of rounds that cannot be, or ranks that there are not.
        """
        progress = await self._rollout.ack(ack)
        if progress is None:
            return
        self._metrics.rounds.labels(*ack.name).inc(len(progress.rounds))
        self._metrics.moved_bytes.labels(*ack.name).inc(progress.moved_bytes)
        if ack.outcome is Outcome.APPLIED:
            self._metrics.applied_version.labels(*ack.name).set(ack.layout_version)
        if ack.outcome is not Outcome.APPLYING:
            self._metrics.migrations.labels(*ack.name, ack.outcome.value).inc()
        if progress.failure is not None:
            # A worker that does not wait for the end of it must not leave a failed layout in force.
            await self._work.run(self._recover(progress.failure))

    async def sweep(self) -> None:
        """Give up orders of which nothing was heard in time."""
        for failure in self._rollout.overdue():
            self._metrics.migrations.labels(*failure.name, "overdue").inc()
            try:
                await self._work.run(self._recover(failure))
            except OmniError as error:
                log.error("not recovered", extra={"group": failure.name.group, "error": error.message})

    async def settle(self) -> None:
        """Wait for recoveries under way."""
        await self._work.settle()

    async def rollback(self, name: GroupName, to_version: int) -> Published:
        """Put an earlier layout in force again, whatever is under way; 0 is the newest that was not given up.

        Raises:
            NotFound: no such version is kept.
            InvalidRequest: it puts experts on ranks that are excluded.
        """
        target = self._version(name, to_version) if to_version else self._before(name)
        if target is None:
            message = f"version {to_version}" if to_version else "no earlier layout"
            raise NotFound(f"{message} of the group is not kept", field="to_version", reason="no_version")
        if used := self._excluded_in(target):
            message = f"version {target.version} has experts on excluded ranks {used}"
            raise InvalidRequest(message, field="to_version", reason="excluded_rank")
        return await self._rollout.publish(name, target.layout, target.solver, ROLLED_BACK, is_urgent=True)

    async def set_ranks(self, name: GroupName, excluded_ranks: frozenset[int]) -> Published:
        """Plan without these ranks, at once; ranks not named hold experts again.

        Raises:
            NotFound: the group has no layout.
            InvalidRequest: ranks that there are not, or too few left.
            FailedPrecondition: an expert is on ranks only that a worker said have failed.
        """
        known = self._layouts.history(name)
        out = known.exclusions
        exclusions = Exclusions(excluded_ranks, out.failed & excluded_ranks, out.lost & excluded_ranks)
        if known.exclusions == exclusions:
            return known.in_force
        return await self._planner.replan(name, exclusions, "ranks_changed")

    async def _recover(self, failure: Failure) -> None:
        told = {"model": failure.name.model, "group": failure.name.group, "layout_version": failure.version}
        log.error("layout not applied", extra={**told, "ranks": sorted(failure.failed_ranks), "detail": failure.detail})
        try:
            if failure.failed_ranks:
                await self._leave_out(failure)
            else:
                await self._go_back(failure)
        finally:
            # The stream of what failed ends, whatever became of the way back.
            session = self._rollout.session(failure.name)
            if session and session.order and session.order.published.version == failure.version:
                self._rollout.end(session)

    async def _leave_out(self, failure: Failure) -> None:
        """Plan without the ranks that failed; where that cannot be, the worker keeps what it holds."""
        known = self._layouts.exclusions(failure.name)
        if failure.is_first:
            exclusions = replace(known, lost=known.silent | failure.failed_ranks)
        else:
            exclusions = replace(known, failed=known.failed | failure.failed_ranks)
        try:
            await self._planner.replan(failure.name, exclusions, "rank_failed", failure.version)
        except OmniError:
            await self._keep(failure)
            raise

    async def _go_back(self, failure: Failure) -> None:
        """To the layout before, once; where going back fails too, the worker keeps what it holds."""
        known = self._layouts.history(failure.name)
        target = None if known.in_force.reason == ROLLED_BACK else self._before(failure.name)
        if target is None or self._excluded_in(target):
            await self._keep(failure)
            return
        await self._rollout.publish(
            failure.name,
            target.layout,
            target.solver,
            ROLLED_BACK,
            failed_version=failure.version,
            is_urgent=True,
        )

    async def _keep(self, failure: Failure) -> None:
        """What the worker holds becomes the layout in force, so that nothing moves."""
        await self._rollout.publish(
            failure.name, failure.held, "held", "kept", failed_version=failure.version, is_urgent=True
        )

    def _before(self, name: GroupName) -> Published | None:
        """The newest layout before the one in force that was not given up and fits the same ranks."""
        *earlier, in_force = self._layouts.history(name).layouts
        return next(
            (
                p
                for p in reversed(earlier)
                if p.outcome is not Outcome.FAILED and same_outline(p.layout.topology, in_force.layout.topology)
            ),
            None,
        )

    def _version(self, name: GroupName, version: int) -> Published | None:
        return next((p for p in self._layouts.history(name).layouts if p.version == version), None)

    def _excluded_in(self, target: Published) -> list[int]:
        """Excluded ranks that a layout puts experts on."""
        excluded = sorted(self._layouts.exclusions(target.name).ranks)
        return [rank for rank in excluded if target.layout.indicator[rank].any()]
