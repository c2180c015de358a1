"""LoRA adapters by name: those that workers serve, and those that some have served."""

import logging
from collections.abc import Callable, Collection

log = logging.getLogger(__name__)

_MOST = 1024


class KnownAdapters:
    """Names that workers have told. What nobody serves any more is forgotten when there are more than `most`.

    An adapter that is called like one of `taken`, the model's own names, is out of reach; a log line says so.
    """

    def __init__(
        self,
        most: int = _MOST,
        on_forgotten: Callable[[str], None] | None = None,
        taken: Collection[str] = (),
    ) -> None:
        self._most = most
        self._taken = frozenset(taken)
        self._on_forgotten = on_forgotten
        self._names: dict[str, None] = {}
        self._served: frozenset[str] = frozenset()

    def __contains__(self, name: object) -> bool:
        """From any thread."""
        return name in self._names

    @property
    def served(self) -> frozenset[str]:
        """By some worker that is there, whether it takes work or not."""
        return self._served

    def told(self, served: Collection[str]) -> None:
        """What all workers together serve now."""
        if self._served == served:
            return
        for name in sorted(self._taken.intersection(served) - self._served):
            log.warning(
                "an adapter is named as the model or an alias is: nobody can ask for it", extra={"adapter": name}
            )
        self._served = frozenset(served)
        # The order is that in which they were served last.
        self._names = {name: None for name in self._names if name not in self._served} | dict.fromkeys(self._served)
        for name in list(self._names)[: max(0, len(self._names) - max(self._most, len(self._served)))]:
            del self._names[name]
            if self._on_forgotten is not None:
                self._on_forgotten(name)
