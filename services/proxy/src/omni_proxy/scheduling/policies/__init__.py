"""The policies by name. `cost` is the default; the others are for comparison and for fleets that want their rule."""

from collections.abc import Mapping, Sequence
from typing import Any

from omni_proxy.scheduling.cost import CostParameters, CostPolicy
from omni_proxy.scheduling.filtered import Filtered, FilterUse
from omni_proxy.scheduling.interfaces import Policy
from omni_proxy.scheduling.plugins import Plugin, named, table
from omni_proxy.scheduling.policies import batches, labelled, load, prefix, session, weighted
from omni_proxy.scheduling.policies.legs import PairParameters

POLICIES: Mapping[str, Plugin[Policy]] = {
    "cost": Plugin(CostParameters, CostPolicy),
    "round_robin": Plugin(PairParameters, load.RoundRobin),
    "least_loaded": Plugin(PairParameters, load.least_loaded),
    "least_uncached_tokens": Plugin(PairParameters, load.least_uncached_tokens),
    "power_of_two": Plugin(load.PowerOfTwoParameters, load.PowerOfTwo),
    "prefix_affinity": Plugin(prefix.PrefixAffinityParameters, prefix.prefix_affinity),
    "sticky_until_saturated": Plugin(prefix.StickyParameters, prefix.sticky_until_saturated),
    "weighted_scorers": Plugin(weighted.WeightedScorersParameters, weighted.WeightedScorers),
    "session": Plugin(session.SessionParameters, session.session),
    "topology": Plugin(labelled.TopologyParameters, labelled.topology),
    "lora_affinity": Plugin(labelled.LoraParameters, labelled.lora_affinity),
    "length_bucket": Plugin(labelled.LengthBucketParameters, labelled.length_bucket),
    "lpt": Plugin(batches.LptParameters, batches.lpt),
    "earliest_batch": Plugin(batches.EarliestBatchParameters, batches.earliest_batch),
}


def policies() -> Mapping[str, Plugin[Policy]]:
    """The shipped ones and those of installed distributions."""
    return table("policies", POLICIES)


def policy_of(
    name: str, parameters: Mapping[str, Any] | None = None, filters: Sequence[FilterUse | Mapping[str, Any]] = ()
) -> Policy:
    """The policy of that name behind the filters.

    Raises:
        InvalidRequest: an unknown name or parameter, or a wrong value.
    """
    policy = named("policies", policies(), name).build(name, parameters)
    return Filtered.around(policy, filters) if filters else policy
