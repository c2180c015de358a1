"""Blocks that dispatched legs are about to compute, as expected entries of the prefix index."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from omni_common.blocks import KEY_BYTES
from omni_common.prefix_index import PrefixIndex
from omni_proxy.metrics import PrefixMetrics


class Mark:
    """One leg's blocks on one worker: expected until they are computed and a little longer, or the leg fails."""

    def __init__(self, worker_id: str, keys: bytes, end: "Callable[[Mark, bool], None]") -> None:
        self.worker_id = worker_id
        self.keys = keys
        self._end = end
        self._has_ended = False

    def computed(self) -> None:
        """The worker has the blocks; its own word of them is on the way."""
        self._finish(True)

    def withdraw(self) -> None:
        """The blocks will not be computed. Nothing happens if they were already."""
        self._finish(False)

    def _finish(self, is_computed: bool) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._end(self, is_computed)


class Marks:
    """The marks of all running legs, renewed in whichever index is current."""

    def __init__(
        self,
        index: Callable[[], PrefixIndex],
        on_computed: Callable[[str, bytes], None],
        ttl_s: float,
        metrics: PrefixMetrics,
    ) -> None:
        self._index = index
        self._on_computed = on_computed
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._running: dict[tuple[str, bytes], dict[Mark, asyncio.TimerHandle]] = {}
        self._count = 0

    @contextmanager
    def mark(self, worker_id: str, keys: bytes) -> Iterator[Mark]:
        """Expect the blocks; they are withdrawn on exit unless the mark was told that they are computed."""
        mark = Mark(worker_id, keys, self._ended)
        self._renew(mark)
        self._counted(1)
        try:
            yield mark
        finally:
            mark.withdraw()

    def set_again(self) -> None:
        """Another index is current."""
        for siblings in self._running.values():
            for mark in siblings:
                self._expect(mark)

    def _renew(self, mark: Mark) -> None:
        self._expect(mark)
        timer = asyncio.get_running_loop().call_later(self._ttl_s / 2, self._renew, mark)
        self._running.setdefault(_family(mark), {})[mark] = timer

    def _ended(self, mark: Mark, is_computed: bool) -> None:
        family = self._running[_family(mark)]
        family.pop(mark).cancel()
        if not family:
            del self._running[_family(mark)]
        self._counted(-1)
        self._metrics.marks.labels("computed" if is_computed else "withdrawn").inc()
        if is_computed:
            self._expect(mark)
            self._on_computed(mark.worker_id, mark.keys)
            return
        self._index().withdraw(mark.worker_id, mark.keys)
        for other in family:
            self._expect(other)

    def _expect(self, mark: Mark) -> None:
        self._index().expect(mark.worker_id, mark.keys, self._ttl_s)

    def _counted(self, change: int) -> None:
        self._count += change
        self._metrics.marks_running.set(self._count)


def _family(mark: Mark) -> tuple[str, bytes]:
    """Marks that may share blocks: prompts on one worker that begin alike."""
    return mark.worker_id, mark.keys[:KEY_BYTES]
