"""What the queue knows of one waiting request."""

from dataclasses import dataclass

OUTPUT_WEIGHT = 2.0
"""Service of a generated token in prompt tokens; each takes a share of a step of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """Instants are on the owner's monotonic clock. Compared by identity: clients may repeat a request id.

    `uncached_tokens` and `prefill_ms` are of the worker where they are least; 0 ms where nothing is predicted.
    """

    request_id: str
    arrived_s: float
    deadline_s: float
    """When the client stops waiting for the whole answer."""
    tenant: str = ""
    priority: int = 0
    weight: float = 1.0
    """Share of the tenant among the tenants of its band."""
    prompt_tokens: int = 0
    uncached_tokens: int = 0
    output_tokens: int = 0
    """Expected, not the most that are allowed."""
    size_bytes: int = 0
    """Of memory kept while it waits."""
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    prefill_ms: float = 0.0
    adapter: str = ""
    """LoRA adapter that its workers have to serve; empty: any worker does."""

    @property
    def ttft_deadline_s(self) -> float:
        """When its first token is due; infinite where nothing was promised."""
        return float("inf") if self.ttft_slo_ms is None else self.arrived_s + self.ttft_slo_ms / 1e3

    @property
    def latest_start_s(self) -> float:
        """The last instant at which computing its prompt may begin for the first token to be in time."""
        return self.ttft_deadline_s - self.prefill_ms / 1e3

    @property
    def service(self) -> float:
        """Expected service in prompt tokens, at least 1."""
        return max(1.0, self.uncached_tokens + OUTPUT_WEIGHT * self.output_tokens)
