"""Whether the worker takes one more piece of work, of which leg, and how much it has taken."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from omni_common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from omni_engine.hosting.settings import EngineRole, Leg

_FIRST_GUESS_S = 0.1
_SMOOTHING = 0.2
_SHORTEST_RETRY_S = 0.05


class Admission:
    """Counts accepted prefills and sequences; refuses when not ready, draining or full, and what it does not serve."""

    def __init__(self, model: str, role: EngineRole = "both") -> None:
        self._model = model
        self._limit = 0
        self._adapters: frozenset[str] = frozenset()
        self._seconds = _FIRST_GUESS_S
        self._changed = asyncio.Event()
        self.active = 0
        self.refused = 0
        self.is_ready = False
        self.is_draining = False
        self.role: EngineRole = role

    def open(self, limit: int, adapters: Iterable[str] = ()) -> None:
        """The engine is loaded; at most `limit` pieces of work at once, of the model or one of its adapters."""
        self._limit = limit
        self._adapters = frozenset(adapters)
        self.is_ready = True
        self._announce()

    def close(self) -> None:
        """The engine is gone."""
        self.is_ready = False
        self._announce()

    def set_draining(self, draining: bool) -> None:
        self.is_draining = draining
        self._announce()

    def set_role(self, role: EngineRole) -> None:
        """Take the legs of this role from now on; what runs goes on."""
        self.role = role
        self._announce()

    def check(self, model: str, leg: Leg, adapter: str = "") -> None:
        """Raises Unavailable, FailedPrecondition or ResourceExhausted for work that is not taken."""
        try:
            self._check(model, leg, adapter)
        except (Unavailable, FailedPrecondition, ResourceExhausted):
            self.refused += 1
            raise

    def _check(self, model: str, leg: Leg, adapter: str) -> None:
        if not self.is_ready:
            raise Unavailable("the engine is not ready", reason="loading", retry_after_s=1.0)
        if self.is_draining:
            raise Unavailable("the worker is draining", reason="draining")
        if model and model != self._model:
            raise FailedPrecondition(f"this worker serves {self._model!r}, not {model!r}", reason="wrong_model")
        if adapter and adapter not in self._adapters:
            raise FailedPrecondition(
                f"this worker does not serve the adapter {adapter!r}", reason="no_adapter", field="adapter"
            )
        if self.role not in (leg, "both"):
            raise FailedPrecondition(f"this worker's role is {self.role}, not {leg}", reason="wrong_role")
        if self.active >= self._limit:
            raise ResourceExhausted(
                f"{self.active} requests are in progress, the most this worker takes",
                reason="queue_full",
                retry_after_s=max(_SHORTEST_RETRY_S, self._seconds),
            )

    def enter(self) -> None:
        """One more piece of work runs; pair with `leave`."""
        self.active += 1

    def leave(self) -> None:
        self.active -= 1
        if self.active == 0:
            self._announce()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Count one piece of work while the block runs."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def observe(self, seconds: float) -> None:
        """How long one piece of work took; what a refused caller is told to wait follows it."""
        self._seconds += _SMOOTHING * (seconds - self._seconds)

    async def changed(self, timeout_s: float) -> None:
        """Returns at the next change of readiness, role, draining or emptiness, or when the time is up."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
