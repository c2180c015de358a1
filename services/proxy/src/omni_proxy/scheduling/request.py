"""What a choice of workers has to know of one request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """Service levels in milliseconds; None where nothing was promised."""

    ttft_ms: float | None = None
    itl_ms: float | None = None


NO_SLO = Slo()


@dataclass(frozen=True, slots=True)
class SchedulingRequest:
    """One sequence that needs workers.

    `held_by` is the worker that holds its blocks under a lease, `kv_connector` the kind of that handle: only decode
    workers of that kind can pull them. `output_tokens` is how many are expected, not the most that are allowed.
    """

    prompt_tokens: int
    may_prefill: bool = True
    kv_connector: str | None = None
    held_by: str | None = None
    excluded: frozenset[str] = frozenset()
    output_tokens: int = 128
    slo: Slo = NO_SLO
    waited_ms: float = 0.0
    """Since the request arrived; counts against its SLO."""
    session: str = ""
    """Equal for requests of one conversation or agent; empty where the client named none."""
    adapter: str = ""
    """LoRA adapter; empty: the model itself."""
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what was promised to them."""

    tenant: str = ""
    priority: int = 0
    weight: float = 1.0
    """Share of the tenant among those of its priority."""
    slo: Slo = NO_SLO
    session: str = ""


NOBODY = Caller()
