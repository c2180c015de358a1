"""LoRA adapters by name, which of them lie in an engine's slots, and whose turn it is where slots are few. Pure."""

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

MAX_NAME_CHARS = 128
PATIENCE_S = 5.0
"""So long an adapter without a slot waits while others keep theirs. Shorter turns make smaller batches."""
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:/-]{{0,{MAX_NAME_CHARS - 1}}}")

K = TypeVar("K", bound=Hashable)


def checked_name(given: str) -> str:
    """The name as it is. Raises `ValueError` that quotes it and says what to write instead."""
    if not _NAME.fullmatch(given):
        raise ValueError(
            f"{given!r}: write a letter or digit, then letters, digits and . _ : / - ({MAX_NAME_CHARS} at most)"
        )
    return given


class AdapterSlots:
    """Adapters in slots: those of sequences, then the last used, `size` at most.

    An engine that admits more at a time than it has slots for makes the surplus wait, so of the adapters in use only
    the first `size` count.
    """

    def __init__(self, size: int = 0) -> None:
        self._size = size
        self._users: Counter[str] = Counter()
        self._used: OrderedDict[str, None] = OrderedDict()

    def enter(self, adapter: str) -> None:
        """One more sequence uses it; pair with `leave`. Nothing for the empty name."""
        if adapter:
            self._users[adapter] += 1
            self.touch(adapter)

    def leave(self, adapter: str) -> None:
        if not adapter:
            return
        self._users[adapter] -= 1
        if not self._users[adapter]:
            del self._users[adapter]
            self.touch(adapter)

    @property
    def names(self) -> tuple[str, ...]:
        idle = [name for name in reversed(self._used) if name not in self._users]
        return tuple([*self._users, *idle][: self._size])

    def touch(self, adapter: str) -> None:
        """It was used last."""
        self._used[adapter] = None
        self._used.move_to_end(adapter)


class AdapterTurns(Generic[K]):
    """Keeps the adapters that fill the slots from doing so for ever.

    An engine passes over whoever finds no slot, so adapters in use stay in use for as long as more of theirs come.
    Once another starves, newcomers that are not of such an adapter are kept out until it has begun: those that run end,
    and a slot falls free. An adapter starves when nothing of it runs and it has waited for `patience_s`, counted anew
    when a piece of its work begins and when a starving one gets its turn: who comes next has to have a turn as well.

    Pieces of work are named by keys. No slots: there is one for each adapter, and nobody is kept out.
    """

    def __init__(self, slots: int = 0, patience_s: float = PATIENCE_S) -> None:
        self._slots = slots
        self._patience_s = patience_s
        self._waiting: dict[str, dict[K, float]] = {}
        """In the engine and not begun, by adapter: since when."""
        self._running: Counter[str] = Counter()
        self._adapters: dict[K, str] = {}
        """Of all that are in the engine."""
        self._kept_out: dict[K, tuple[str, float]] = {}
        self._begun_s: dict[str, float] = {}
        """When a piece of an adapter's work last began."""
        self._turn_s = -math.inf
        self._may_free = False

    @property
    def kept_out(self) -> int:
        return len(self._kept_out)

    def keeps_out(self, key: K) -> bool:
        return key in self._kept_out

    def comes(self, key: K, adapter: str, now_s: float) -> bool:
        """Whether it may enter the engine now; if not, `admitted` names it later."""
        if not adapter or not self._slots:
            return True
        if self._must_wait(adapter, now_s):
            self._kept_out[key] = adapter, now_s
            return False
        self._enter(key, adapter, now_s)
        return True

    def begins(self, key: K, now_s: float) -> None:
        """The engine computes it, so its adapter has a slot. A second call does nothing."""
        adapter = self._adapters.get(key, "")
        if key not in self._waiting.get(adapter, ()):
            return
        if self._starves(adapter, now_s):
            self._turn_s = now_s
        self._no_longer_waits(key, adapter)
        self._running[adapter] += 1
        self._begun_s[adapter] = now_s
        self._may_free = True

    def leaves(self, key: K) -> None:
        """It ended, begun or not, or was taken back."""
        self._kept_out.pop(key, None)
        adapter = self._adapters.pop(key, "")
        if not adapter:
            return
        self._may_free = True
        if key in self._waiting.get(adapter, ()):
            self._no_longer_waits(key, adapter)
        else:
            self._running[adapter] -= 1
            if not self._running[adapter]:
                del self._running[adapter]

    def admitted(self, now_s: float) -> list[K]:
        """Those kept out that may enter now, in the order they came; they have entered."""
        if not self._kept_out or not self._may_free:
            return []
        self._may_free = False
        going = [key for key, (adapter, _) in self._kept_out.items() if not self._must_wait(adapter, now_s)]
        for key in going:
            self._enter(key, *self._kept_out.pop(key))
        return going

    def _enter(self, key: K, adapter: str, came_s: float) -> None:
        self._adapters[key] = adapter
        self._waiting.setdefault(adapter, {})[key] = came_s

    def _no_longer_waits(self, key: K, adapter: str) -> None:
        waiting = self._waiting[adapter]
        del waiting[key]
        if not waiting:
            del self._waiting[adapter]

    def _must_wait(self, adapter: str, now_s: float) -> bool:
        if len({adapter} | self._waiting.keys() | self._running.keys()) <= self._slots:
            return False
        starving = [name for name in self._waiting if self._starves(name, now_s)]
        return bool(starving) and adapter not in starving

    def _starves(self, adapter: str, now_s: float) -> bool:
        if adapter in self._running:
            return False
        came_s = next(iter(self._waiting[adapter].values()))
        return now_s - max(came_s, self._turn_s, self._begun_s.get(adapter, came_s)) >= self._patience_s
