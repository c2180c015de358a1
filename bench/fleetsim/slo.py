"""What was promised to a request, and whether it was kept."""

from dataclasses import dataclass

from fleetsim.constants import PREFILL
from fleetsim.record import Served
from omni_proxy.scheduling.request import Slo


@dataclass(frozen=True, slots=True)
class Promise:
    """First token within `ttft_s` and `unloaded_factor` times what the prompt takes on an idle, empty engine; `itl_s`
    is held against a request's mean gap, the wait for decode and every stall included."""

    name: str
    ttft_s: float
    unloaded_factor: float = 0.0
    itl_s: float = 0.05

    def ttft_of(self, unloaded_s: float) -> float:
        return self.ttft_s + self.unloaded_factor * unloaded_s

    def of(self, prompt_tokens: int) -> Slo:
        return Slo(self.ttft_of(PREFILL.unloaded_s(prompt_tokens)) * 1e3, self.itl_s * 1e3)

    def first_kept(self, served: Served) -> bool:
        return served.ttft_s <= self.ttft_of(served.unloaded_s)

    def kept(self, served: Served) -> bool:
        return self.first_kept(served) and served.itl_s <= self.itl_s


FIXED = Promise("fixed", 5.0)
SCALED = Promise("scaled", 2.0, 2.0)
PROMISES = {promise.name: promise for promise in (FIXED, SCALED)}
