"""What is known of one prompt in the workers' caches when they are chosen, and what came of it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from omni_proxy.fleet import Fleet, Worker
from omni_proxy.marks import Mark
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.scheduling.forecast import reusable_tokens
from omni_proxy.scheduling.policy import Candidate
from omni_proxy.tracing import Attribute


class Foresight:
    """Follows one prompt; each `candidates` is a new look, which the rest refers to."""

    def __init__(self, prompt: Sequence[int], keys: PromptKeys, fleet: Fleet, metrics: PrefixMetrics) -> None:
        self._prompt = prompt
        self._all_keys = keys
        self._fleet = fleet
        self._metrics = metrics
        self._keys: dict[int, bytes] = {}
        self._seen: Mapping[str, Candidate] = {}

    def keys(self, block_size: int) -> bytes:
        if block_size not in self._keys:
            self._keys[block_size] = self._all_keys.of(self._prompt, block_size)
        return self._keys[block_size]

    def candidates(self) -> Sequence[Candidate]:
        found = self._fleet.candidates(self.keys)
        self._seen = {candidate.worker_id: candidate for candidate in found}
        return found

    def uncached_tokens(self, worker: Worker) -> int:
        """Prompt tokens that are neither in the worker's hbm nor on the way there."""
        return max(0, len(self._prompt) - self._seen[worker.id].cached_tokens)

    def attributes(self, worker: Worker) -> Mapping[str, Attribute]:
        seen = self._seen[worker.id]
        return {
            "omni.worker_id": seen.worker_id,
            "omni.predicted_cached_tokens": seen.cached_tokens,
            "omni.expected_tokens": seen.expected_tokens,
            "omni.loadable_tokens": seen.loadable_tokens,
            "omni.load_ms": seen.load_ms,
        }

    def mark(self, worker: Worker) -> AbstractContextManager[Mark]:
        """The worker is about to compute the prompt."""
        return self._fleet.replica.mark(worker.id, self.keys(worker.block_size))

    def pulled(self, worker: Worker) -> None:
        """The worker has the prompt's blocks from another one."""
        self._fleet.replica.computed(worker.id, self.keys(worker.block_size))

    def compare(self, worker: Worker, cached_tokens: int) -> int:
        """Count what the worker says it found cached beside what was foreseen, which is returned."""
        seen = self._seen[worker.id].cached_tokens
        predicted = reusable_tokens(seen, len(self._prompt), worker.block_size)
        self._metrics.compare(predicted, cached_tokens)
        return predicted
