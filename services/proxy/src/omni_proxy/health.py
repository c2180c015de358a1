"""Which workers are too sick for new work: one circuit breaker per worker. Pure; times are passed in, in seconds.

closed --failures, silence--> open --its time is up--> half open --successes--> closed
                               ^                           |
                               +---------- failure --------+

Half open takes one request at a time; each success admits one more beside it, until the circuit closes. Never more
than a share of the workers of a leg are out at once, and never all of them: sick workers are better than none.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class Outcome(StrEnum):
    """What a leg's end says of the worker. Only the first and the last are evidence."""

    SUCCESS = "success"
    REFUSAL = "refusal"
    CLIENT = "client"
    FAILURE = "failure"


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Cause(StrEnum):
    """Why a worker was taken out."""

    CONSECUTIVE = "consecutive_failures"
    RATIO = "failure_ratio"
    SILENT = "silent"
    PROBE = "probe_failed"


class HealthSettings(BaseModel):
    """When a worker is taken out, for how long, and how it returns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    consecutive_failures: int = Field(3, ge=1, description="Failures in a row that take a worker out")
    failure_ratio: float = Field(0.6, gt=0, le=1, description="Share of failed legs that takes a worker out")
    ratio_window_s: float = Field(10.0, gt=0, description="Over about this long")
    ratio_min_legs: float = Field(10.0, ge=1, description="Legs in the window below which the share says nothing")
    same_event_s: float = Field(0.05, ge=0, description="Failures closer than this count once: one broken connection")
    ejection_s: float = Field(1.0, gt=0, description="First time out; each one after it lasts twice as long")
    max_ejection_s: float = Field(30.0, gt=0, description="Longest time out")
    forgive_s: float = Field(60.0, gt=0, description="In service for this long, the next time out is the first again")
    max_ejected_ratio: float = Field(0.5, ge=0, le=1, description="Largest share of a leg's workers out at once")
    close_after: int = Field(4, ge=1, description="Successes of a half open worker that return it fully")
    probe_timeout_s: float = Field(30.0, gt=0, description="When a probing request without an end is forgotten")
    probe_interval_s: float = Field(1.0, gt=0, description="How often a worker that is out is asked to describe itself")
    stall_factor: float = Field(20.0, gt=1, description="A leg is late after so many times its predicted time")
    stall_min_s: float = Field(3.0, gt=0, description="But not before this")
    stall_max_s: float = Field(60.0, gt=0, description="And always after this")
    silence_s: float = Field(2.5, gt=0, description="Without load reports for this long, a late worker is stuck")
    alive_factor: float = Field(4.0, ge=1, description="Reporting ones may be late for so many times longer")
    alive_min_s: float = Field(60.0, gt=0, description="And for this long at least")

    def patience_s(self, predicted_s: float) -> float:
        """How long a leg that is predicted to take `predicted_s` may take before it is late."""
        return min(self.stall_max_s, max(self.stall_min_s, self.stall_factor * predicted_s))

    def is_stuck(self, waited_s: float, predicted_s: float, silent_s: float) -> bool:
        """Nothing came for `waited_s` where `predicted_s` was foreseen, and no load report for `silent_s`."""
        patience_s = self.patience_s(predicted_s)
        if silent_s < self.silence_s:
            patience_s = max(self.alive_min_s, patience_s * self.alive_factor)
        return waited_s >= patience_s


@dataclass(slots=True)
class _Circuit:
    legs: frozenset[str]
    is_here: bool = True
    state: State = State.CLOSED
    cause: str = ""
    until: float = 0.0
    closed_at: float = 0.0
    ejections: int = 0
    consecutive: int = 0
    failures: float = 0.0
    ended: float = 0.0
    weighed_at: float = 0.0
    failed_at: float = float("-inf")
    permits: int = 1
    probing: list[float] = field(default_factory=list)

    def weigh(self, is_failure: bool, now: float, window_s: float) -> None:
        """Count one leg; earlier ones fade with e^(-age / window)."""
        kept = math.exp(-max(0.0, now - self.weighed_at) / window_s)
        self.failures = self.failures * kept + is_failure
        self.ended = self.ended * kept + 1
        self.weighed_at = now

    def forget_legs(self) -> None:
        self.consecutive, self.failures, self.ended, self.failed_at = 0, 0.0, 0.0, float("-inf")


_NOBODY: frozenset[str] = frozenset()


class Health:
    """Owns the circuits. `began` and `outcome` are told of every leg, `refusal` is asked before a choice."""

    def __init__(
        self,
        settings: HealthSettings,
        on_ejected: Callable[[Cause], None] = lambda _: None,
        on_spared: Callable[[Cause], None] = lambda _: None,
    ) -> None:
        """`on_spared` is told of ejections that the bound on their number forbade."""
        self.settings = settings
        self._on_ejected = on_ejected
        self._on_spared = on_spared
        self._circuits: dict[str, _Circuit] = {}
        self._out: dict[str, _Circuit] = {}
        self._num_here: Counter[str] = Counter()
        self._num_out: Counter[str] = Counter()

    def join(self, worker_id: str, legs: Collection[str]) -> None:
        """A worker can be reached; what is known of it from before stays. `legs` are the kinds of work it takes."""
        circuit = self._circuits.setdefault(worker_id, _Circuit(frozenset(legs), is_here=False))
        self._count(circuit, -1)
        circuit.is_here, circuit.legs = True, frozenset(legs)
        self._count(circuit, +1)

    def away(self, worker_id: str) -> None:
        """A worker cannot be reached; the others' share is counted without it."""
        if (circuit := self._circuits.get(worker_id)) is not None:
            self._count(circuit, -1)
            circuit.is_here = False

    def forget(self, worker_id: str) -> None:
        """The worker is gone or was replaced by a new process."""
        self.away(worker_id)
        self._circuits.pop(worker_id, None)
        self._out.pop(worker_id, None)

    def refusal(self, worker_id: str, now: float) -> str | None:
        """Why the worker takes no new work; None if it does."""
        circuit = self._out.get(worker_id)
        if circuit is None or self._is_panic(circuit):
            return None
        if self._state(circuit, now) is State.OPEN:
            return f"ejected: {circuit.cause}"
        oldest = now - self.settings.probe_timeout_s
        circuit.probing = [began for began in circuit.probing if began > oldest]
        return "ejected: probing" if len(circuit.probing) >= circuit.permits else None

    def refused(self, now: float) -> frozenset[str]:
        """Workers that take no new work."""
        if not self._out:
            return _NOBODY
        return frozenset(worker for worker in self._out if self.refusal(worker, now) is not None)

    def began(self, worker_id: str, now: float) -> None:
        """A leg was sent to the worker."""
        circuit = self._out.get(worker_id)
        if circuit is not None and self._state(circuit, now) is State.HALF_OPEN:
            circuit.probing.append(now)

    def outcome(self, worker_id: str, kind: Outcome, now: float) -> None:
        """A leg ended, or gave its first token, which is a success."""
        circuit = self._circuits.get(worker_id)
        if circuit is None:
            return
        state = self._state(circuit, now)
        if circuit.probing:
            circuit.probing.pop(0)
        if kind not in (Outcome.SUCCESS, Outcome.FAILURE) or state is State.OPEN:
            return
        if state is State.HALF_OPEN:
            self._probe_ended(worker_id, circuit, kind, now)
        elif kind is Outcome.SUCCESS:
            circuit.consecutive = 0
            circuit.weigh(False, now, self.settings.ratio_window_s)
        elif now - circuit.failed_at >= self.settings.same_event_s:
            circuit.failed_at = now
            circuit.consecutive += 1
            circuit.weigh(True, now, self.settings.ratio_window_s)
            if (cause := self._verdict(circuit)) is not None:
                self._eject(worker_id, circuit, cause, now)

    def silence(self, worker_id: str, now: float) -> None:
        """A leg on the worker is stuck; see `HealthSettings.is_stuck`."""
        circuit = self._circuits.get(worker_id)
        if circuit is not None and self._state(circuit, now) is not State.OPEN:
            self._eject(worker_id, circuit, Cause.SILENT, now)

    def probed(self, worker_id: str, is_well: bool, now: float) -> None:
        """An active probe's answer. A worker that does not answer stays out for longer."""
        circuit = self._out.get(worker_id)
        if circuit is not None and not is_well and self._state(circuit, now) is State.OPEN:
            circuit.until = max(circuit.until, now + self.settings.ejection_s)

    def is_due(self, worker_id: str, now: float) -> bool:
        """The worker's time out is about to end; a probe now says whether it should."""
        circuit = self._out.get(worker_id)
        if circuit is None or self._state(circuit, now) is not State.OPEN:
            return False
        return circuit.until - now <= self.settings.probe_interval_s

    def state(self, worker_id: str, now: float) -> State:
        circuit = self._out.get(worker_id)
        return State.CLOSED if circuit is None else self._state(circuit, now)

    def counts(self, now: float) -> Mapping[State, int]:
        """Reachable workers by state."""
        found = dict.fromkeys(State, 0)
        for circuit in self._circuits.values():
            if circuit.is_here:
                found[self._state(circuit, now)] += 1
        return found

    def _state(self, circuit: _Circuit, now: float) -> State:
        if circuit.state is State.OPEN and now >= circuit.until:
            circuit.state, circuit.permits, circuit.probing = State.HALF_OPEN, 1, []
        return circuit.state

    def _verdict(self, circuit: _Circuit) -> Cause | None:
        settings = self.settings
        if circuit.consecutive >= settings.consecutive_failures:
            return Cause.CONSECUTIVE
        if circuit.ended >= settings.ratio_min_legs and circuit.failures / circuit.ended >= settings.failure_ratio:
            return Cause.RATIO
        return None

    def _probe_ended(self, worker_id: str, circuit: _Circuit, kind: Outcome, now: float) -> None:
        if kind is Outcome.FAILURE:
            self._eject(worker_id, circuit, Cause.PROBE, now)
            return
        circuit.permits += 1
        if circuit.permits > self.settings.close_after:
            self._count(circuit, -1)
            circuit.state, circuit.closed_at = State.CLOSED, now
            circuit.forget_legs()
            circuit.probing = []
            del self._out[worker_id]
            self._count(circuit, +1)

    def _eject(self, worker_id: str, circuit: _Circuit, cause: Cause, now: float) -> None:
        if circuit.state is State.CLOSED:
            if not self._has_room(circuit):
                self._on_spared(cause)
                return
            if now - circuit.closed_at >= self.settings.forgive_s:
                circuit.ejections = 0
        self._count(circuit, -1)
        circuit.ejections += 1
        growth = 2.0 ** min(circuit.ejections - 1, 32)
        circuit.until = now + min(self.settings.max_ejection_s, self.settings.ejection_s * growth)
        circuit.state, circuit.cause, circuit.probing = State.OPEN, cause, []
        self._out[worker_id] = circuit
        self._count(circuit, +1)
        self._on_ejected(cause)

    def _count(self, circuit: _Circuit, sign: int) -> None:
        """Take the circuit into the sums per leg, or out of them; around every change of what they count."""
        if circuit.is_here:
            for leg in circuit.legs:
                self._num_here[leg] += sign
                self._num_out[leg] += sign * (circuit.state is not State.CLOSED)

    def _allowed(self, leg: str) -> int:
        here = self._num_here[leg]
        return max(0, min(int(here * self.settings.max_ejected_ratio), here - 1))

    def _has_room(self, circuit: _Circuit) -> bool:
        return not circuit.is_here or all(self._num_out[leg] < self._allowed(leg) for leg in circuit.legs)

    def _is_panic(self, circuit: _Circuit) -> bool:
        """So many of the others went away that those who are out are needed."""
        return any(self._num_out[leg] > self._allowed(leg) for leg in circuit.legs)
