"""The proxy under a profiler: `python -m proxyload.profiled FILE`. SIGUSR1 begins, SIGUSR2 ends and writes FILE."""

import cProfile
import signal
import sys
from pathlib import Path

from omni_proxy.__main__ import main as serve


def main() -> None:
    path, profiler = Path(sys.argv.pop(1)), cProfile.Profile()

    def end(*_: object) -> None:
        profiler.disable()
        profiler.dump_stats(str(path) + ".part")
        Path(str(path) + ".part").rename(path)

    signal.signal(signal.SIGUSR1, lambda *_: profiler.enable())
    signal.signal(signal.SIGUSR2, end)
    serve()


if __name__ == "__main__":
    main()
