"""An event loop whose clock jumps to the next timer when nothing else can run: minutes pass in seconds."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Ready sockets are served at once; where the loop would wait for a timer, its time jumps instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            return super().select(None)
        self.now_s += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0. Threads and other processes run in real time and must not be waited for."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)
        self._passes_left = -1
        self._callback: Callable[[], object] = _nothing

    def time(self) -> float:
        return self._jumping.now_s

    def after_passes(self, count: int, callback: Callable[[], object]) -> None:
        """Call it between two passes of the loop, `count` passes from here; one at a time."""
        self._passes_left, self._callback = count, callback

    def has_called(self) -> bool:
        return self._passes_left < 0

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        self._passes_left -= 1
        if self._passes_left == -1:
            self._callback()


def _nothing() -> None: ...


def run(main: Coroutine[Any, Any, T]) -> T:
    """The result of `main`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
