"""What is known of one prompt on the workers when they are chosen, and what came of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from omni_proxy.fleet import Fleet, PromptForecast
from omni_proxy.ledger import Charge
from omni_proxy.marks import Mark
from omni_proxy.metrics import PrefixMetrics
from omni_proxy.prompt_keys import PromptKeys
from omni_proxy.scheduling.forecast import reusable_tokens
from omni_proxy.scheduling.times import Seen, prompt_features
from omni_proxy.scheduling.view import FleetView, Floats
from omni_proxy.tracing import Attribute
from omni_proxy.worker import Worker


class Foresight:
    """Follows one prompt; each `view` is a new look, which the rest refers to."""

    def __init__(
        self,
        prompt: Sequence[int],
        keys: PromptKeys,
        fleet: Fleet,
        metrics: PrefixMetrics,
        now: Callable[[], float],
        salt: str = "",
        adapter: str = "",
    ) -> None:
        self._prompt = prompt
        self._salt = salt
        self._adapter = adapter
        self._all_keys = keys
        self._fleet = fleet
        self._metrics = metrics
        self._now = now
        self._keys: dict[int, bytes] = {}
        self._found: PromptForecast | None = None
        self._view: FleetView | None = None
        self._rows: Mapping[str, int] = {}

    def keys(self, block_size: int) -> bytes:
        if block_size not in self._keys:
            self._keys[block_size] = self._all_keys.of(self._prompt, block_size, self._salt, self._adapter)
        return self._keys[block_size]

    def prepare(self) -> None:
        """Compute what a look needs of the prompt alone."""
        for block_size in self._fleet.usable_block_sizes():
            self.keys(block_size)

    def view(self, output_tokens: int, generated: int = 0, *, afresh: bool = True) -> FleetView:
        """The fleet as of now; its caches as of the last look unless they are to be looked at `afresh`.

        `generated` tokens follow the prompt already; whoever goes on without its blocks computes them too.
        """
        found = self._found
        if afresh or found is None or not self._fleet.is_current(found):
            found = self._found = self._fleet.forecast(self.keys)
            self._rows = dict(zip(found.ids, range(len(found.ids)), strict=True))
        self._view = self._fleet.view(found, len(self._prompt) + generated, output_tokens, self._adapter)
        return self._view

    def cached_tokens(self, worker: Worker) -> int:
        """Of the prompt, in the worker's hbm or on the way there."""
        if self._view is None or worker.id not in self._rows:
            return 0
        return min(len(self._prompt), int(self._view.cached_tokens[self._rows[worker.id]]))

    def uncached_tokens(self, worker: Worker, generated: int = 0) -> int:
        """Tokens that the worker has to compute or load."""
        return len(self._prompt) + generated - self.cached_tokens(worker)

    def _load_ms(self, worker: Worker) -> float:
        """What bringing the adapter into a slot there takes."""
        if not self._adapter or self._view is None or worker.id not in self._rows:
            return 0.0
        return float(self._view.adapter_ms[self._rows[worker.id]])

    def attributes(self, worker: Worker) -> Mapping[str, Attribute]:
        row = self._rows.get(worker.id)
        if self._view is None or row is None:
            return {"omni.worker_id": worker.id}
        return {
            "omni.worker_id": worker.id,
            "omni.predicted_cached_tokens": int(self._view.cached_tokens[row]),
            "omni.expected_tokens": int(self._view.expected_tokens[row]),
            "omni.loadable_tokens": int(self._view.loadable_tokens[row]),
            "omni.load_ms": float(self._view.load_ms[row]),
        }

    def compute_on(self, worker: Worker, output_tokens: int, generated: int = 0) -> "Computing":
        """The worker is to compute the prompt and what was `generated`: a charge, with the learning that follows."""
        slot = self._fleet.columns.slot(worker.id)
        ahead, loads_ms = self._fleet.times.work_ahead(slot, self._now())
        cached, load_ms = self.cached_tokens(worker), self._load_ms(worker)
        uncached = len(self._prompt) + generated - cached
        charge = self._fleet.ledger.charge(worker.id, (uncached, cached), output_tokens, load_ms)
        return Computing(self._fleet, slot, ahead, loads_ms + load_ms, len(self._prompt) + generated, charge)

    def mark(self, worker: Worker) -> AbstractContextManager[Mark]:
        """The worker is about to compute the prompt."""
        return self._fleet.replica.mark(worker.id, self.keys(worker.block_size))

    def pulled(self, worker: Worker) -> None:
        """The worker has the prompt's blocks from another one."""
        self._fleet.replica.computed(worker.id, self.keys(worker.block_size))

    def compare(self, worker: Worker, cached_tokens: int, foreseen: int | None = None) -> int:
        """Count what the worker says it found cached beside what was foreseen, which is returned.

        `foreseen`: the worker's cached tokens of an earlier look.
        """
        seen = self.cached_tokens(worker) if foreseen is None else foreseen
        predicted = reusable_tokens(seen, len(self._prompt), worker.block_size)
        self._metrics.compare(predicted, cached_tokens)
        return predicted


class Computing:
    """A prompt on its way through one worker. A context that settles what it still holds when it ends.

    `ahead` are the features of what the worker computes before it, `loads_ms` what adapters take, its own included.
    """

    def __init__(self, fleet: Fleet, slot: int, ahead: Floats, loads_ms: float, tokens: int, charge: Charge) -> None:
        self._fleet = fleet
        self._slot = slot
        self._ahead = ahead
        self._loads_ms = loads_ms
        self._tokens = tokens
        self.charge = charge

    def __enter__(self) -> "Computing":
        self.charge.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.charge.__exit__(None, None, None)

    def computed(self, cached_tokens: int, took_ms: float) -> Seen | None:
        """The worker computed it in `took_ms`, waiting included, and had found so many tokens cached."""
        self.charge.computed()
        work = self._ahead + prompt_features(max(0, self._tokens - cached_tokens), cached_tokens)
        return self._fleet.times.saw_prompt(self._slot, work, took_ms, self._loads_ms)
