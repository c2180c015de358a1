"""A conversation stays where it was, with no table of conversations."""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from omni_proxy.scheduling import hashing
from omni_proxy.scheduling.policies.legs import ByLeg, LegRule, PairParameters, Ranking, tiered
from omni_proxy.scheduling.policies.load import sequences, tokens_ahead
from omni_proxy.scheduling.policies.prefix import LongestPrefix
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView, Rows


class SessionParameters(PairParameters):
    balance: float = Field(1.25, ge=1, description="Sequences a worker may hold, as a multiple of the mean")
    affinity_threshold: float = Field(
        0.5, ge=0, le=1, description="Without a session: cached share of the prompt that counts as a hit"
    )


def session(parameters: SessionParameters) -> ByLeg:
    longest = LongestPrefix(parameters.affinity_threshold)
    return ByLeg(
        "session",
        Rendezvous(parameters.balance, tokens_ahead, longest.prefill),
        Rendezvous(parameters.balance, sequences, longest.decode),
        parameters.disaggregate_min_tokens,
    )


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The session's worker by rendezvous hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018).

    A worker that holds more than its share of sequences is passed over for the session's next one, so that one busy
    conversation, or many that hash alike, cannot overload it. Without a session the prompt's prefix stands in for it.
    """

    balance: float
    load: LegRule
    without_session: LegRule

    def __call__(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        if not request.session:
            return self.without_session(request, view, rows)
        there = view.sequences[rows]
        capacity = np.ceil(self.balance * (there.sum() + 1) / len(rows))
        is_full = (there >= capacity).astype(np.int64)
        weight = hashing.weights(request.session, [view.ids[row] for row in rows])
        load = self.load(request, view, rows)
        terms = {**load.terms, "weight": weight, "full": is_full}
        return Ranking(tiered(is_full, 1.0 - weight), (load.value, *load.ties), terms)
