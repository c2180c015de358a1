"""Loops compiled by numba over tensors that are handed over by address: as arrays each would cost a microsecond."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """On first call; kept on disk where numba finds a writable folder (see NUMBA_CACHE_DIR)."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # a read-only installation without a writable home: compiled anew in each process
        return cast(F, numba.njit(nogil=True)(function))


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def pointer(context: Any, address: Any, scalar: Any) -> Any:
    """In compiled code: `address` as a pointer to values of the type `scalar`, for `numba.carray`."""
    del context

    def build(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return numba.types.CPointer(scalar.dtype)(numba.types.int64, scalar), build


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def as_float(context: Any, word: Any) -> Any:
    """In compiled code: the float32 whose bits are those of an int32."""
    del context, word

    def build(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], target.get_value_type(signature.return_type))

    return numba.types.float32(numba.types.int32), build
