"""Looks at every group again and again: a layout that pays is put in force."""

import logging
import time

from omni_common.errors import OmniError
from omni_placement.book import LayoutBook
from omni_placement.load.book import GroupName
from omni_placement.metrics import Metrics
from omni_placement.planning import Planner
from omni_placement.reports import Reports
from omni_placement.rollout import Rollout

log = logging.getLogger(__name__)


class Rebalancer:
    """Forecast, plan, decide, publish. Groups whose newest report is older than `max_age_s` are left alone."""

    def __init__(
        self,
        layouts: LayoutBook,
        rollout: Rollout,
        reports: Reports,
        planner: Planner,
        metrics: Metrics,
        max_age_s: float,
    ) -> None:
        self._layouts, self._rollout, self._reports = layouts, rollout, reports
        self._planner, self._metrics, self._max_age_s = planner, metrics, max_age_s

    async def look_at_all(self) -> None:
        """Look at every group once."""
        for name in self._layouts.names():
            await self.look(name)

    async def look(self, name: GroupName) -> str:
        """Look at one group; the reason why it moved or did not, a stable word."""
        try:
            reason = await self._look(name)
        except OmniError as error:
            reason = "error"
            log.warning("not rebalanced", extra={"model": name.model, "group": name.group, "error": error.message})
        except Exception:
            reason = "error"
            log.exception("rebalancing failed", extra={"model": name.model, "group": name.group})
        self._metrics.decisions.labels(*name, reason).inc()
        return reason

    async def _look(self, name: GroupName) -> str:
        age_s = self._reports.age_s(name)
        if age_s is None or age_s > self._max_age_s:
            return "no_load"
        if (imbalance := self._reports.predicted_imbalance(name)) is not None:
            self._metrics.predicted_imbalance.labels(*name).set(imbalance)
        session = self._rollout.session(name)
        if session is not None and session.order is not None:
            return "migration_in_flight"
        start_s = time.perf_counter()
        solved, decision = await self._planner.rebalanced(name)
        self._metrics.plan_seconds.labels(solved.solver).observe(time.perf_counter() - start_s)
        if decision is None:
            return "other_topology"
        if decision.publish:
            await self._rollout.publish(name, decision.layout, solved.solver, "rebalanced")
            self._reports.planned(name)
        return decision.reason.value
