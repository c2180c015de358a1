"""A conversation stays where it was, with no table of conversations."""

from dataclasses import dataclass

from pydantic import Field

from omni_proxy.scheduling import hashing
from omni_proxy.scheduling.policies.legs import ByLeg, LegRule, PairParameters, Ranking, tiered
from omni_proxy.scheduling.policies.load import sequences, tokens_ahead
from omni_proxy.scheduling.policies.prefix import LongestPrefix
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import FleetView, Rows


class SessionParameters(PairParameters):
    balance: float = Field(1.25, ge=1, description="Load a worker may hold, as a multiple of the mean")
    free_tokens: int = Field(16_384, ge=0, description="Prompt tokens ahead that a prefill worker may hold in any case")
    free_sequences: int = Field(4, ge=0, description="Sequences that a decode worker may hold in any case")
    affinity_threshold: float = Field(
        0.8, ge=0, le=1, description="Without a session: cached share of the prompt that counts as a hit"
    )


def session(parameters: SessionParameters) -> ByLeg:
    balance, longest = parameters.balance, LongestPrefix(parameters.affinity_threshold)
    return ByLeg(
        "session",
        Rendezvous(tokens_ahead, longest.prefill, balance, parameters.free_tokens),
        Rendezvous(sequences, longest.decode, balance, parameters.free_sequences),
        parameters.disaggregate_min_tokens,
    )


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The session's worker by rendezvous hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018).

    A worker that holds more than its share of the load is passed over for the session's next one, so that one busy
    conversation, or many that hash alike, cannot overload it. Without a session the prompt's prefix stands in for it.
    """

    load: LegRule
    without_session: LegRule
    balance: float
    free: float

    def __call__(self, request: SchedulingRequest, view: FleetView, rows: Rows) -> Ranking:
        load = self.load(request, view, rows)
        is_full = load.value > max(self.balance * load.value.mean(), self.free)
        if not request.session:
            other = self.without_session(request, view, rows)
            return Ranking(tiered(is_full, other.value), other.ties, {**other.terms, "full": is_full.astype(int)})
        weight = hashing.weights(request.session, [view.ids[row] for row in rows])
        terms = {**load.terms, "weight": weight, "full": is_full.astype(int)}
        return Ranking(tiered(is_full, 1.0 - weight), (load.value, *load.ties), terms)
