"""Rendezvous hashing: all who know the same names rank them alike, and a lost name moves only its own keys."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from omni_proxy.scheduling.view import Floats

_Words = NDArray[np.uint64]


def weights(key: str, names: Sequence[str]) -> Floats:
    """[0, 1) by name; the greatest wins the key."""
    words = np.array([_name(name) for name in names], np.uint64)
    return (_mixed(words ^ np.uint64(_word(key))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _word(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


_name = lru_cache(maxsize=8192)(_word)
"""Names of workers come back with every key; keys do not."""


def _mixed(words: _Words) -> _Words:
    """The finaliser of splitmix64: each bit of the input moves half of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
