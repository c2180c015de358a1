"""One leg on one worker, as the worker's health sees it."""

from collections.abc import Callable
from typing import Self

from omni_common.errors import Code, OmniError
from omni_proxy.health import Health, Outcome

STALLED = "stalled"
"""Reason of the error that ends a leg on a worker gone quiet."""
_REFUSALS = frozenset({"rejected", "draining", "loading"})
"""Reasons of a worker that is well and takes no work."""


def outcome_of(error: OmniError) -> Outcome:
    """Whose fault an error of a leg is."""
    if error.reason in _REFUSALS or error.code in (Code.RESOURCE_EXHAUSTED, Code.FAILED_PRECONDITION):
        return Outcome.REFUSAL
    if error.code in (Code.UNAVAILABLE, Code.INTERNAL):
        return Outcome.FAILURE
    return Outcome.CLIENT


class Attempt:
    """One leg on one worker, from now on. A context: an end without a verdict was the client's doing."""

    __slots__ = ("_health", "_now", "_verdict", "_worker_id")

    def __init__(self, health: Health, worker_id: str, now: Callable[[], float]) -> None:
        self._health = health
        self._worker_id = worker_id
        self._now = now
        self._verdict: Outcome | None = None
        health.began(worker_id, now())

    def succeeded(self) -> None:
        """Tokens came; told once."""
        if self._verdict is None:
            self._tell(Outcome.SUCCESS)

    def failed(self, error: OmniError) -> None:
        if error.reason == STALLED:
            self._verdict = Outcome.FAILURE
            self._health.silence(self._worker_id, self._now())
        else:
            self._tell(outcome_of(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._verdict is None:
            self._tell(Outcome.CLIENT)

    def _tell(self, kind: Outcome) -> None:
        self._verdict = kind
        self._health.outcome(self._worker_id, kind, self._now())
