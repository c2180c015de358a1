"""How loops over arrays are compiled.

Compiled functions call only those of their own file: numba's cache on disk notices changes of a function's own file,
not of those it calls into. What passes between files are arrays.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compiled on first call; kept on disk where numba finds a writable folder (see NUMBA_CACHE_DIR)."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # a read-only installation without a writable home: compiled anew in each process
        return cast(F, numba.njit(nogil=True)(function))
