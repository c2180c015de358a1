"""LoRA adapters by name, and which of them lie in an engine's slots. Pure."""

import re
from collections import Counter, OrderedDict

MAX_NAME_CHARS = 128
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:/-]{{0,{MAX_NAME_CHARS - 1}}}")


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
