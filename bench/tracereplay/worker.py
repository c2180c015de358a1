"""One simulated worker: a finite prefix cache and a model of time. Pure; its owner keeps the clock.

Prompts are prefilled one after the other, in `base_ms + uncached tokens * ms_per_token`. A prompt's blocks are in the
cache from the end of its prefill on. The request then holds its blocks for `ms_per_output_token` per output token;
after that the cache may evict them, least recently used first. A prompt that does not fit yet waits, and all behind it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omni_engine.ports import BlockEvent
from omni_engine.sim.blocks import BlockPool
from tracereplay.trace import BLOCK_TOKENS, Request, reusable


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Milliseconds. A model: no device was measured."""

    base_ms: float = 5.0
    ms_per_token: float = 0.15
    ms_per_output_token: float = 30.0

    def prefill_s(self, uncached_tokens: int) -> float:
        return (self.base_ms + uncached_tokens * self.ms_per_token) / 1000

    def decode_s(self, output_tokens: int) -> float:
        return output_tokens * self.ms_per_output_token / 1000


@dataclass(slots=True)
class Job:
    """A request on its way through a worker: what the router believed, and what came of it."""

    request: Request
    sent_s: float
    believed_tokens: int
    prefilled: "Callable[[Job], None]"
    hit_blocks: int = 0
    blocks: Sequence[int] = ()
    prefilled_s: float = 0.0

    @property
    def uncached_tokens(self) -> int:
        """Known once its prefill begins."""
        return self.request.input_tokens - self.hit_blocks * BLOCK_TOKENS

    @property
    def believed_uncached_tokens(self) -> int:
        return self.request.input_tokens - self.believed_tokens


class Worker:
    """`changed` hears every change of the cache as it happens; `later(delay_s, action)` is the owner's clock."""

    def __init__(
        self,
        num_blocks: int,
        times: TimeModel,
        changed: Callable[[Sequence[BlockEvent]], None],
        later: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._pool = BlockPool(num_blocks, BLOCK_TOKENS)
        self._num_blocks, self._times = num_blocks, times
        self._changed, self._later = changed, later
        self._waiting: deque[Job] = deque()
        self._computing: Job | None = None

    def take(self, job: Job) -> None:
        """Queue a request. Raises ValueError for one that the cache can never hold."""
        if _blocks_of(job.request) > self._num_blocks:
            raise ValueError(f"a request of {_blocks_of(job.request)} blocks in a cache of {self._num_blocks}")
        self._waiting.append(job)
        self._begin()

    def _begin(self) -> None:
        if self._computing is not None or not self._waiting:
            return
        job = self._waiting[0]
        request = job.request
        cached = self._pool.match(request.keys[: reusable(request)])
        fresh = self._pool.allocate(_blocks_of(request) - len(cached))
        if fresh is None:
            self._pool.release(cached)
            return
        self._waiting.popleft()
        self._tell()
        self._computing, job.blocks, job.hit_blocks = job, [*cached, *fresh], len(cached)
        self._later(self._times.prefill_s(job.uncached_tokens), self._end_prefill)

    def _end_prefill(self) -> None:
        job, self._computing = self._computing, None
        if job is None:
            raise RuntimeError("no prefill was under way")
        self._pool.register(job.blocks, job.request.keys, job.hit_blocks, (), "")
        self._tell()
        job.prefilled(job)
        self._later(self._times.decode_s(job.request.output_tokens), lambda: self._end(job))
        self._begin()

    def _end(self, job: Job) -> None:
        self._pool.release(job.blocks)
        self._begin()

    def _tell(self) -> None:
        if events := self._pool.take_events():
            self._changed(events)


def _blocks_of(request: Request) -> int:
    """Room for the prompt and all of its answer."""
    return -(-(request.input_tokens + request.output_tokens) // BLOCK_TOKENS)
