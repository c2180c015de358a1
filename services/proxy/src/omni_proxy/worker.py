"""One worker as this proxy sees it: what it is, how it is loaded, whether it takes work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from omni_proxy.ports import DecodePort, PrefillPort

GROUP_LABEL = "omni.group"
"""Prefill and decode workers pair within a group."""
HARDWARE_LABEL = "omni.hardware"
"""Workers of one engine and hardware are taken to be alike until seen."""


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker is; constant for one epoch, but for its role."""

    id: str
    address: str
    role: Role
    epoch: int
    model: str
    block_size: int
    max_model_len: int
    max_num_seqs: int = 0
    kv_connector: str = ""
    engine: str = ""
    num_blocks: int = 0
    max_num_batched_tokens: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()
    """LoRA adapters it serves besides the model itself."""
    adapter_load_ms: float = 0.0
    """To bring one into a slot; 0: nothing to speak of, or not known."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Digests of the model's own, by the empty name, and of the adapters', as far as it tells them."""

    def kv_kind(self, adapter: str = "") -> str:
        """Blocks are handed over between workers of one kind; empty: between none."""
        kind = f"{self.kv_connector}/{self.block_size}/{self.weights_of(adapter)}"
        return kind if self.kv_connector else ""

    def weights_of(self, adapter: str = "") -> str:
        """Of all that computes a sequence with the adapter; empty: the model alone."""
        known = (self.weights.get(name, "") for name in dict.fromkeys(("", adapter)))
        return "+".join(filter(None, known))

    @property
    def group(self) -> str:
        return self.labels.get(GROUP_LABEL, "")

    def can_pull_from(self, holder: "Worker", adapter: str = "") -> bool:
        """As `Pairing` has it for all workers at once."""
        kind = self.kv_kind(adapter)
        is_same_group = self.group == holder.group or not (self.group and holder.group)
        return self.id != holder.id and is_same_group and kind == holder.kv_kind(adapter) != ""


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's own account of its load; `others_*` is the work of other proxies.

    Since the worker's epoch began `steps` generated tokens and took `busy_ms` in all while `computed_prompt_tokens`
    were computed, and `prompts` with `prompt_tokens` uncached ones took `prompt_busy_ms`, whoever sent them.
    """

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_usage: float = 0.0
    leases: int = 0
    step_ms: float = 0.0
    draining: bool = False
    others_prefills: int = 0
    others_uncached_tokens: int = 0
    others_sequences: int = 0
    context_tokens: int = 0
    steps: int = 0
    busy_ms: float = 0.0
    computed_prompt_tokens: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    prompt_busy_ms: float = 0.0
    adapters: frozenset[str] = frozenset()
    """In the engine's slots."""


@dataclass(slots=True)
class Member:
    """One worker and its state. `is_listed` turns false when the kvstore says that it left."""

    worker: Worker
    prefill: PrefillPort | None
    decode: DecodePort | None
    is_reachable: bool = False
    is_listed: bool = True
    is_draining: bool = False
    on_load: "Callable[[Load, Load], None] | None" = None
    """Hears the load before and now."""
    _load: Load = field(default_factory=Load)
    _sent_adapters: set[str] = field(default_factory=set)
    """With legs since the last report, which need not know of them; `_sent_before`: since the one before."""
    _sent_before: set[str] = field(default_factory=set)

    @property
    def load(self) -> Load:
        return self._load

    @load.setter
    def load(self, load: Load) -> None:
        before, self._load = self._load, load
        if self._sent_adapters or self._sent_before:
            self._sent_before, self._sent_adapters = self._sent_adapters, set()
        if self.on_load is not None:
            self.on_load(before, load)

    def sends(self, adapter: str) -> None:
        """A leg with the adapter goes to the worker."""
        self._sent_adapters.add(adapter)

    def has_in_slot(self, adapter: str) -> bool:
        """By its own account, or soon by ours."""
        return adapter in self._load.adapters or adapter in self._sent_adapters or adapter in self._sent_before

    @property
    def prefills(self) -> bool:
        return self.prefill is not None and self.worker.role is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self.decode is not None and self.worker.role is not Role.PREFILL

    @property
    def refusal(self) -> str | None:
        """Why the worker takes no work; None if it does."""
        if not self.is_listed:
            return "left"
        if not self.is_reachable:
            return "unreachable"
        if self.is_draining or self.load.draining:
            return "draining"
        if self.decodes and self.decode is not None and not self.decode.ready:
            return "no session"
        return None
