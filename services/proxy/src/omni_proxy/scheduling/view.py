"""The workers one request may go to, as columns: row i of every array is the worker `ids[i]`.

Columns rather than objects, so that a choice among hundreds of workers is a few array operations. Read only: arrays
belong to whoever made the view.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from omni_proxy.scheduling.request import SchedulingRequest

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


class Times(Protocol):
    """What the predictors say of this request on each worker, in milliseconds. Computed when first asked for."""

    @property
    def queue_ms(self) -> Floats:
        """Until the prompts ahead of this one are computed."""

    @property
    def prefill_ms(self) -> Floats:
        """Computing the part of this prompt that is not cached, without the wait."""

    @property
    def step_ms(self) -> Floats:
        """A decode step with the sequences already there and this one: its inter-token latency."""

    @property
    def stall_ms(self) -> Floats:
        """How long the longest step lasts in which the worker computes this prompt beside its running sequences."""

    @property
    def seat_ms(self) -> Floats:
        """Until the worker's batch and its cache have room for this sequence."""

    @property
    def confidence(self) -> Floats:
        """[0, 1]: 0 is the prior alone."""

    def transfer_ms(self, prefills: Rows, decodes: Rows) -> Floats:
        """Moving the prompt's blocks between each pair; prefills x decodes."""


class Pairing:
    """Which workers can hand over blocks to which. Constant while the same workers take work, so shared by views.

    `connectors` are kinds of KV blocks, by connector, size and weights: legs pair where they are equal and not empty.
    `groups` tie workers together: legs pair where they are equal, or where one has none (empty).
    """

    def __init__(self, connectors: Sequence[str], groups: Sequence[str]) -> None:
        self.connectors = tuple(connectors)
        self.groups = tuple(groups)
        self._can: Bools | None = None

    def can_pair(self, prefills: Rows, decodes: Rows) -> Bools:
        """Never a worker with itself; prefills x decodes."""
        if self._can is None:
            kind, group = _codes(self.connectors), _codes(self.groups)
            same_kind = (kind[:, None] == kind) & (kind > 0)
            same_group = (group[:, None] == group) | (group[:, None] == 0) | (group == 0)
            self._can = same_kind & same_group & ~np.eye(len(kind), dtype=np.bool_)
        return self._can[prefills[:, None], decodes]


@dataclass(frozen=True, slots=True)
class FleetView:
    """Workers that take work for the model at the moment of a choice.

    Token columns named cached, expected and loadable are of this request's prompt: in the worker's hbm or on the way
    there; the share of those still being computed for another request; what follows and could be loaded in `load_ms`.
    `own_*` is this proxy's ledger, `others_*` what the worker says of other callers.
    """

    ids: tuple[str, ...]
    prefills: Bools
    """Takes the prefill leg of a pair."""
    decodes: Bools
    pairing: Pairing
    labels: tuple[Mapping[str, str], ...]
    cached_tokens: Ints
    expected_tokens: Ints
    loadable_tokens: Ints
    load_ms: Floats
    has_adapter: Bools
    """The request's adapter is in a slot; all true for the model itself."""
    adapter_ms: Floats
    """Bringing it into one; 0 where it is, or where nothing is known."""
    own_requests: Ints
    """Legs in flight."""
    own_prefills: Ints
    """Of those, prompts being computed or waiting to be."""
    own_uncached_tokens: Ints
    own_output_tokens: Ints
    """Expected and not received yet."""
    dispatched: Ints
    """Legs ever sent."""
    others_prefills: Ints
    others_uncached_tokens: Ints
    others_sequences: Ints
    running: Ints
    waiting: Ints
    kv_usage: Floats
    context_tokens: Ints
    """Of all running sequences."""
    max_num_seqs: Ints
    """0: unknown."""
    stats_age_s: Floats
    times: Times

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ahead_tokens(self) -> Ints:
        """Uncached prompt tokens in flight to or on each worker, whoever sent them."""
        return self.own_uncached_tokens + self.others_uncached_tokens

    @property
    def sequences(self) -> Ints:
        """Sequences on each worker, this proxy's own counted as they are now."""
        return self.own_requests + self.others_sequences

    def uncached_tokens(self, request: SchedulingRequest) -> Ints:
        """Prompt tokens each worker would have to compute or load."""
        return np.maximum(request.prompt_tokens - self.cached_tokens, 0)

    @property
    def connectors(self) -> tuple[str, ...]:
        """Kind of KV connector by row; empty: none."""
        return self.pairing.connectors

    @property
    def groups(self) -> tuple[str, ...]:
        """By row; empty: none."""
        return self.pairing.groups

    def can_pair(self, prefills: Rows, decodes: Rows) -> Bools:
        """Which rows can hand over blocks to which, never a worker to itself; prefills x decodes."""
        return self.pairing.can_pair(prefills, decodes)


def _codes(words: Sequence[str]) -> Ints:
    """Equal words as equal numbers; 0 is the empty one."""
    known = {"": 0}
    return np.array([known.setdefault(word, len(known)) for word in words], np.int64)


@dataclass(frozen=True, slots=True)
class FixedTimes:
    """Times given as columns, for tests, simulations and what-if questions."""

    queue_ms: Floats
    prefill_ms: Floats
    step_ms: Floats
    stall_ms: Floats
    seat_ms: Floats
    confidence: Floats
    pair_ms: float = 0.0

    def transfer_ms(self, prefills: Rows, decodes: Rows) -> Floats:
        return np.full((len(prefills), len(decodes)), self.pair_ms)


@dataclass(slots=True)
class WorkerRow:
    """One worker of a hand-made view; names as in `FleetView` and `Times`."""

    worker_id: str
    prefills: bool = False
    decodes: bool = False
    connector: str = "c"
    group: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    cached_tokens: int = 0
    expected_tokens: int = 0
    loadable_tokens: int = 0
    load_ms: float = 0.0
    has_adapter: bool = True
    adapter_ms: float = 0.0
    own_requests: int = 0
    own_prefills: int = 0
    own_uncached_tokens: int = 0
    own_output_tokens: int = 0
    dispatched: int = 0
    others_prefills: int = 0
    others_uncached_tokens: int = 0
    others_sequences: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    context_tokens: int = 0
    max_num_seqs: int = 0
    stats_age_s: float = 0.0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    step_ms: float = 0.0
    stall_ms: float = 0.0
    seat_ms: float = 0.0
    confidence: float = 1.0


def view_of(rows: Sequence[WorkerRow], pair_ms: float = 0.0) -> FleetView:
    """A view of hand-made rows; every pair's transfer lasts `pair_ms`."""
    given = {"ids", "pairing", "labels", "times"}
    bools, floats = ("prefills", "decodes", "has_adapter"), ("load_ms", "adapter_ms", "kv_usage", "stats_age_s")
    kinds: Mapping[str, Any] = dict.fromkeys(bools, np.bool_) | dict.fromkeys(floats, np.float64)

    def column(name: str, kind: Any) -> Any:
        return np.array([getattr(row, name) for row in rows], kind)

    names = [f.name for f in fields(FleetView) if f.name not in given]
    times = {f.name: column(f.name, np.float64) for f in fields(FixedTimes) if f.name != "pair_ms"}
    return FleetView(
        ids=tuple(row.worker_id for row in rows),
        pairing=Pairing([row.connector for row in rows], [row.group for row in rows]),
        labels=tuple(row.labels for row in rows),
        times=FixedTimes(**times, pair_ms=pair_ms),
        **{name: column(name, kinds.get(name, np.int64)) for name in names},
    )
