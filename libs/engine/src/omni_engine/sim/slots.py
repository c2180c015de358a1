"""Adapters in the slots of a simulated engine. Pure."""

from collections import OrderedDict
from collections.abc import Collection


class Slots:
    """Owns `size` slots; the adapter used longest ago makes room."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last_used: OrderedDict[str, None] = OrderedDict()

    def has_room(self, adapter: str, in_use: Collection[str]) -> bool:
        """Whether a sequence of it may join those whose adapters are in use; one of the model itself always may."""
        return not adapter or adapter in in_use or len(in_use) < self._size

    def bring_in(self, adapters: Collection[str], in_use: Collection[str]) -> int:
        """A step computes with `adapters`, some of the at most `size` in use; returns how many were in no slot."""
        missing = [name for name in adapters if name not in self._last_used]
        for name in adapters:
            self._last_used[name] = None
            self._last_used.move_to_end(name)
        for name in [name for name in self._last_used if name not in in_use][
            : max(0, len(self._last_used) - self._size)
        ]:
            del self._last_used[name]
        return len(missing)

    def names(self, in_use: Collection[str]) -> tuple[str, ...]:
        """Those in use, then the last used."""
        recent = [*reversed(self._last_used)]
        return tuple(sorted(recent, key=lambda name: name not in in_use))
