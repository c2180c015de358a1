"""What this proxy has in flight on each worker. The only writer of own load."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from omni_proxy.scheduling.columns import Columns
from omni_proxy.scheduling.times import prompt_features
from omni_proxy.scheduling.view import Floats

_NO_WORK = np.zeros(3)
_WRITE_EVERY = 16
"""Received tokens are added up before the column is written: a write to an array costs as much as ten additions."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """One worker's account: charged on dispatch, settled when the leg answers or ends."""

    requests: int = 0
    prefills: int = 0
    uncached_tokens: int = 0
    output_tokens: int = 0
    dispatched: int = 0


class Charge:
    """One leg on one worker. A context: what is still charged when it ends is settled then."""

    __slots__ = (
        "_answer",
        "_columns",
        "_load_ms",
        "_now",
        "_output",
        "_prompts",
        "_received",
        "_slot",
        "_uncached",
        "_work",
    )

    def __init__(
        self,
        columns: Columns,
        slot: int,
        now: Callable[[], float],
        uncached: int,
        work: Floats,
        output: int,
        load_ms: float,
        prompts: "dict[Charge, None]",
    ) -> None:
        """`prompts`: those of the worker, in the order they were sent."""
        self._columns = columns
        self._prompts = prompts
        self._slot = slot
        self._now = now
        self._uncached = uncached
        self._work = work
        self._load_ms = load_ms
        self._output = output
        self._answer = output
        self._received = 0

    def __enter__(self) -> Self:
        columns, slot = self._columns, self._slot
        columns.own_requests[slot] += 1
        columns.dispatched[slot] += 1
        if self._answer:
            columns.own_output_tokens[slot] += self._output
            columns.own_answers[slot, 0] += 1
            columns.own_answers[slot, 1] += self._answer
        if self._work is not _NO_WORK:
            if not columns.own_prefills[slot]:
                columns.busy_since_s[slot] = self._now()
            self._prompts[self] = None
            columns.own_prefills[slot] += 1
            columns.own_uncached_tokens[slot] += self._uncached
            columns.own_work[slot] += self._work
            if self._load_ms:
                columns.own_load_ms[slot] += self._load_ms
        return self

    def computed(self) -> None:
        """The prompt is computed; the next one's turn has come."""
        self._leave(is_computed=True)

    def _leave(self, *, is_computed: bool) -> None:
        """One that is given up is nobody's turn, unless it was the first."""
        if self._work is _NO_WORK:
            return
        columns, slot = self._columns, self._slot
        is_computed |= next(iter(self._prompts)) is self
        del self._prompts[self]
        columns.own_prefills[slot] -= 1
        columns.own_uncached_tokens[slot] -= self._uncached
        # Sums of floats that went in and out need not end at zero.
        columns.own_work[slot] = columns.own_work[slot] - self._work if columns.own_prefills[slot] else 0.0
        if self._load_ms:
            columns.own_load_ms[slot] = columns.own_load_ms[slot] - self._load_ms if columns.own_prefills[slot] else 0.0
        if is_computed:
            columns.busy_since_s[slot] = self._now()
        self._work, self._uncached = _NO_WORK, 0

    def received(self, tokens: int) -> None:
        """So many of the expected output tokens have come; the account follows in steps of some tokens."""
        self._received += tokens
        if self._received >= _WRITE_EVERY:
            self._settle_output()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(is_computed=False)
        self._received = self._output
        self._settle_output()
        columns, slot = self._columns, self._slot
        if self._answer:
            columns.own_answers[slot, 0] -= 1
            columns.own_answers[slot, 1] -= self._answer
        columns.own_requests[slot] -= 1

    def _settle_output(self) -> None:
        tokens = min(self._received, self._output)
        self._columns.own_output_tokens[self._slot] -= tokens
        self._output -= tokens
        self._received = 0


class Ledger:
    def __init__(self, columns: Columns, now: Callable[[], float]) -> None:
        """`now`: seconds on the clock that the fleet's view uses."""
        self._columns = columns
        self._now = now
        self._prompts: defaultdict[int, dict[Charge, None]] = defaultdict(dict)
        """By slot."""

    def of(self, worker_id: str) -> InFlight:
        slot, columns = self._columns.get(worker_id), self._columns
        if slot is None:
            return InFlight()
        return InFlight(
            int(columns.own_requests[slot]),
            int(columns.own_prefills[slot]),
            int(columns.own_uncached_tokens[slot]),
            int(columns.own_output_tokens[slot]),
            int(columns.dispatched[slot]),
        )

    def charge(
        self, worker_id: str, prompt: tuple[int, int] | None = None, output_tokens: int = 0, load_ms: float = 0.0
    ) -> Charge:
        """Hold one leg against a worker.

        `prompt` is (uncached tokens, cached tokens) where the worker is to compute it, `load_ms` what bringing its
        adapter into a slot takes; `output_tokens` are expected.
        """
        slot = self._columns.slot(worker_id)
        work = _NO_WORK if prompt is None else prompt_features(*prompt)
        return Charge(
            self._columns,
            slot,
            self._now,
            prompt[0] if prompt else 0,
            work,
            output_tokens,
            load_ms,
            self._prompts[slot],
        )

    def forget(self, worker_id: str) -> bool:
        """Drop the account of a worker that is gone. False: something still runs there, ask again."""
        slot = self._columns.get(worker_id)
        if slot is not None and self._columns.own_requests[slot]:
            return False
        self._columns.let_go(worker_id)
        return True

    @property
    def total_requests(self) -> int:
        return int(self._columns.own_requests.sum())
