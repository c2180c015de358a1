"""What a plug-in of the scheduler has to be able to do. Each is a method or two; `conformance` holds it to the rest."""

from typing import Protocol, runtime_checkable

from omni_proxy.scheduling.decision import Decision
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView, Floats, Ints, Rows


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


class Predictor(Protocol):
    """Times of one kind: row by row, each the product of coefficients that it learns and features that it is told.

    Features and times are never negative. A row is a worker or a pair of workers.
    """

    def add(self, prior: Floats) -> int:
        """A row that starts from these coefficients, in milliseconds per unit of each feature."""

    def remove(self, row: int) -> None:
        """The next `add` may give the same number to another."""

    def restart(self, row: int) -> None:
        """The engine behind the row is a new one: what is known becomes its prior."""

    def milliseconds(self, rows: Rows | Ints, features: Floats) -> Floats:
        """What features[i] are predicted to take on rows[i]; finite and never negative."""

    def observe(self, row: int, features: Floats, seen_ms: float) -> float:
        """Learns from one time; the milliseconds predicted before. What cannot be a time teaches nothing."""

    def confidence(self, rows: Rows | Ints) -> Floats:
        """[0, 1]; 0: the prior alone."""

    def counts(self, rows: Rows | Ints) -> Ints:
        """Observations since the row was added or restarted."""

    def typical(self, rows: Rows | Ints) -> Floats:
        """Coefficients that stand for those rows: the prior of a newcomer of their kind. There is at least one row."""


@runtime_checkable
class Observer(Protocol):
    """A scorer that remembers what was chosen after it spoke."""

    def chosen(self, request: SchedulingRequest, view: FleetView, decision: Decision) -> None:
        """Called once per decision that it took part in."""
