"""How much of the machine other programs used, which says how far to trust a figure."""

import os
import time

import psutil


class Others:
    """From its making on. Processes started here count as own once they have ended."""

    def __init__(self) -> None:
        self._start_s, self._machine_s, self._own_s = time.monotonic(), _machine_s(), _own_s()

    def share(self) -> float:
        """Of all cores, in [0, 1]."""
        elapsed_s = time.monotonic() - self._start_s
        foreign_s = (_machine_s() - self._machine_s) - (_own_s() - self._own_s)
        return min(1.0, max(0.0, foreign_s / max(elapsed_s, 1e-3) / (os.cpu_count() or 1)))


def _machine_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
