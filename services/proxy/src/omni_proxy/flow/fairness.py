"""How the tenants of a band share it.

The tenant with the least level goes next. A level is the service a tenant has had, divided by its weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from omni_proxy.flow.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Fairness:
    """`service` is what the release of a ticket adds to its tenant's account."""

    service: Callable[[Ticket], float]
    forgets: bool = False
    """Service halves each `half_life_s`."""
    keeps_credit: bool = False
    """Who was away goes first until it has had as much as the others; else it joins them where they are."""
    by_tenant: bool = True


FAIRNESS: Mapping[str, Fairness] = {
    "least_attained_service": Fairness(lambda ticket: ticket.service, forgets=True, keeps_credit=True),
    "round_robin": Fairness(lambda ticket: 1.0),
    "none": Fairness(lambda ticket: 0.0, by_tenant=False),
}
