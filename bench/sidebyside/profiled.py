"""A service under a profiler: `python -m sidebyside.profiled MODULE FILE`. SIGUSR1 begins; SIGUSR2 ends and writes."""

import cProfile
import importlib
import signal
import sys
from pathlib import Path


def main() -> None:
    service, path = importlib.import_module(f"{sys.argv.pop(1)}.__main__"), Path(sys.argv.pop(1))
    profiler = cProfile.Profile()

    def end(*_: object) -> None:
        profiler.disable()
        profiler.dump_stats(str(path) + ".part")
        Path(str(path) + ".part").rename(path)

    signal.signal(signal.SIGUSR1, lambda *_: profiler.enable())
    signal.signal(signal.SIGUSR2, end)
    service.main()


if __name__ == "__main__":
    main()
