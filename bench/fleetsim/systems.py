"""What is compared: a policy of the product, and what is around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fleetsim.constants import DECODE, PREFILL
from omni_proxy.flow.settings import FlowSettings
from omni_proxy.scheduling.interfaces import Policy
from omni_proxy.scheduling.policies import POLICIES, policy_of
from omni_proxy.scheduling.times import Priors

PATIENT = FlowSettings(
    max_requests=1_000_000, max_bytes=1 << 40, max_tenant_requests=1_000_000, max_tenant_bytes=1 << 40, ttl_s=1e6
)
"""The product's defaults, but nothing is refused or expires: every request is counted."""


@dataclass(frozen=True, slots=True)
class System:
    """`flow`: held at the proxy under these settings; None: dispatched at once, served by engines in order of arrival.

    `binds_late`: decode is chosen when prefill ends. `learns`: predictors go on from their priors. `rival`: counts
    among the others that `cost` is held against.
    """

    name: str
    title: str
    policy: Callable[[], Policy]
    flow: FlowSettings | None = None
    binds_late: bool = False
    learns: bool = True
    priors: Priors = field(default_factory=Priors)
    rival: bool = False


def held(**changes: object) -> FlowSettings:
    return PATIENT.model_copy(update=changes)


def true_priors() -> Priors:
    """The engines' own constants, in the predictors' features."""
    model, beside = PREFILL, DECODE
    per_thousand = 1000 * model.kv_bytes_per_token / (model.transfer_gib_per_s * 2**30) * 1e3
    return Priors(
        prompt=(model.prefill_base_ms, model.prefill_token_ms, 1e3 * model.prefill_context_ms),
        step=(beside.step_base_ms, beside.step_sequence_ms, 1e3 * beside.step_context_ms, beside.prefill_token_ms),
        transfer=(model.transfer_latency_ms, per_thousand),
    )


def _product(name: str, title: str, **changes: object) -> System:
    """`cost` as it is shipped, and changes to that."""
    return replace(System(name, title, lambda: policy_of("cost"), held(), binds_late=True), **changes)  # type: ignore[arg-type]


def _plain(name: str) -> System:
    """Another policy as systems with it run: no hold, engines in order of arrival."""
    return System(name, name, lambda: policy_of(name), rival=True)


PRODUCT = (
    _product("cost", "cost, as shipped"),
    _product("cost/no-hold", "cost without hold", flow=None),
    _product("cost/fcfs", "cost, held in order of arrival", flow=held(order="fcfs")),
    _product("cost/spt", "cost, held, shortest first", flow=held(order="spt")),
    _product("cost/early", "cost, decode bound at dispatch", binds_late=False),
    _product("cost/prior", "cost without learning", learns=False),
    _product("cost/true", "cost, given the engines' constants", learns=False, priors=true_priors()),
)
OTHERS = tuple(_plain(name) for name in POLICIES if name not in ("cost", "lora_affinity", "topology"))
"""`topology` needs labels that this fleet has not, `lora_affinity` adapters; they would be `least_uncached_tokens`."""
HELD = tuple(
    replace(_plain(name), name=f"{name}/hold", title=f"{name} with cost's hold and order", flow=held(), rival=False)
    for name in ("round_robin", "least_uncached_tokens")
)
SYSTEMS: Mapping[str, System] = {system.name: system for system in (*PRODUCT, *OTHERS, *HELD)}
