"""Omni Proxy's rules: longest processing time first, and the batch that ends earliest."""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.policies.legs import ByLeg, PairParameters, Ranking, tiered
from omni_proxy.scheduling.policies.load import tokens_to_compute
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import Bools, FleetView, Floats, Ints, Rows


class LptParameters(PairParameters):
    max_sequences: int = Field(
        32, ge=1, description="Sequences of a full decode batch, where the worker does not say its own"
    )


def lpt(parameters: LptParameters) -> ByLeg:
    held = TokensHeld(parameters.max_sequences)
    return ByLeg("lpt", tokens_to_compute, held, parameters.disaggregate_min_tokens)


@dataclass(frozen=True, slots=True)
class TokensHeld:
    """The decode worker with room that holds the fewest tokens, those it will still generate included.

    It is the machine's half of longest processing time first (Graham 1969); the queue's half is an order that releases
    the longest request first.
    """

    max_sequences: int

    def __call__(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        held = view.context_tokens[rows] + view.own_output_tokens[rows]
        there, is_full = view.sequences[rows], self._is_full(view, rows)
        terms: dict[str, Floats | Ints] = {"held": held, "sequences": there, "full": is_full.astype(np.int64)}
        return Ranking(tiered(is_full, held), (there, view.dispatched[rows]), terms)

    def _is_full(self, view: FleetView, rows: Rows) -> Bools:
        said = view.max_num_seqs[rows]
        return view.sequences[rows] >= np.where(said > 0, said, self.max_sequences)


class EarliestBatchParameters(PairParameters):
    max_batch_tokens: int = Field(32_000, ge=1, description="Uncached prompt tokens ahead from which a worker is full")
    max_prompts: int = Field(32, ge=1, description="Prompts ahead from which a worker is full")
    max_sequences: int = Field(
        32, ge=1, description="Sequences of a full decode batch, where the worker does not say its own"
    )
    learned: bool = Field(True, description="Take times from the predictors once they have learned; false: the table")
    batch_ms: tuple[float, ...] = Field(
        (220.0, 280.0, 330.0, 380.0), min_length=1, description="The table: a batch of 1, 2, ... prompts"
    )
    further_ms: float = Field(50.0, ge=0, description="The table: each further prompt of a batch")


def earliest_batch(parameters: EarliestBatchParameters) -> ByLeg:
    held = EarliestSeat(TokensHeld(parameters.max_sequences))
    return ByLeg("earliest_batch", EarliestBatch(parameters), held, parameters.disaggregate_min_tokens)


@dataclass(frozen=True, slots=True)
class EarliestBatch:
    """The prefill worker whose batch with this prompt ends first.

    With q prompts there and a batch of b lasting T(b), Omni Proxy's figure is the rest of the batch being computed
    + T(q + 1) + (T(q + 1) - T(q)) q^2. Here T comes from each worker's predictors: T(q) and the rest are the wait
    for the prompts ahead, T(q + 1) - T(q) is this prompt's own time. Until they have learned, T is Omni Proxy's table:
    then, as there, only the number of prompts counts, and neither their length nor what is cached.
    """

    parameters: EarliestBatchParameters

    def __call__(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        prompts = view.own_prefills[rows] + view.others_prefills[rows]
        load = tokens_to_compute(request, view, rows)
        is_full = (prompts >= self.parameters.max_prompts) | (load.value > self.parameters.max_batch_tokens)
        is_full &= prompts > 0
        if self.parameters.learned and (view.times.confidence[rows] > 0).all():
            further_ms = view.times.prefill_ms[rows]
            batch_ms = view.times.queue_ms[rows] + further_ms
        else:
            further_ms = self._batch_ms(prompts + 1) - self._batch_ms(prompts)
            batch_ms = self._batch_ms(prompts + 1)
        end_ms = batch_ms + further_ms * prompts.astype(np.float64) ** 2
        terms: dict[str, Floats | Ints] = {"end_ms": end_ms, "prompts": prompts, "full": is_full.astype(np.int64)}
        return Ranking(tiered(is_full, end_ms), (load.value, *load.ties), {**load.terms, **terms})

    def _batch_ms(self, prompts: Ints) -> Floats:
        known = np.array((0.0, *self.parameters.batch_ms))
        last = len(known) - 1
        batch_ms: Floats = known[np.minimum(prompts, last)]
        return batch_ms + self.parameters.further_ms * np.maximum(prompts - last, 0)


@dataclass(frozen=True, slots=True)
class EarliestSeat:
    """The decode worker whose batch has room first, and of those with room now the one that holds the fewest tokens."""

    held: TokensHeld

    def __call__(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        held, seat_ms = self.held(request, view, rows), view.times.seat_ms[rows]
        terms: dict[str, Floats | Ints] = {**held.terms, "seat_ms": seat_ms}
        return Ranking(tiered(held.terms["full"], seat_ms), (held.value, *held.ties), terms)
