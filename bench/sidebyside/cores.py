"""Where this process runs."""

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager


@contextmanager
def on(cores: Set[int]) -> Iterator[None]:
    """This process runs on these cores; what it starts meanwhile, too."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
