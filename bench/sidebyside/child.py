"""Processes of a benchmark: one spoken to in JSON lines, and how any is ended."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1]
_CLOSE_S, _REAP_S = 60.0, 20.0


class Broken(Exception):
    """A process ended or did not answer; the message has the end of its log."""


class Child:
    """`python -m module`, from this folder. What it says on stderr is dropped unless `is_heard`."""

    def __init__(self, module: str, *, is_heard: bool = False) -> None:
        self.module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=BENCH,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if is_heard else subprocess.DEVNULL,
            text=True,
        )

    def tell(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next line.

        Raises:
            Broken: it ended without one.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Broken(f"{self.module} ended with code {self._process.wait(_REAP_S)}")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, message: Any) -> dict[str, Any]:
        self.tell(message)
        return self.hear()

    def close(self) -> None:
        """It ends by itself where its input does."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_S)
        self.end()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def terminate(process: subprocess.Popen[Any], grace_s: float) -> None:
    """SIGTERM, and SIGKILL where that takes too long."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
