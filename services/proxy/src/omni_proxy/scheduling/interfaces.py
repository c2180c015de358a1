"""What a plug-in of the scheduler has to be able to do. Each is a method or two; `conformance` holds it to the rest."""

from typing import Protocol, runtime_checkable

from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView, Floats


class Filter(Protocol):
    """Which workers may stay."""

    def keep(self, request: SchedulingRequest, view: FleetView) -> Bools:
        """One value per row of the view. A row may take the legs it is a candidate for, or it may not."""


class Scorer(Protocol):
    """One preference per worker."""

    def score(self, request: SchedulingRequest, view: FleetView) -> Floats:
        """One value in [0, 1] per row of the view, higher is better.

        Candidates are the rows that prefill or decode; the score of any other row is not looked at. When decode is
        scored for a pair, `request.held_by` is its prefill worker.
        """


class Policy(Protocol):
    """The choice itself."""

    def choose(self, request: SchedulingRequest, view: FleetView) -> Decision:
        """Workers that the view allows, and what every candidate would have cost.

        Raises:
            Unavailable: no decode worker takes work.
        """


@runtime_checkable
class Observer(Protocol):
    """A scorer that remembers what was chosen after it spoke."""

    def chosen(self, request: SchedulingRequest, view: FleetView, decision: Decision) -> None:
        """Called once per decision that it took part in."""
