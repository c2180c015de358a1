"""How times are learned, by name. A predictor keeps a row per worker, or pair of workers, for times of one kind."""

from collections.abc import Callable, Mapping

import numpy as np
from pydantic import Field

from omni_proxy.scheduling.interfaces import Predictor
from omni_proxy.scheduling.linear import LONGEST_MS, LinearModel
from omni_proxy.scheduling.plugins import NoParameters, Parameters, Plugin, table
from omni_proxy.scheduling.view import Floats, Ints, Rows

MakePredictor = Callable[[int], Predictor]
"""One for times of so many features."""


class LinearParameters(Parameters):
    forgetting: float = Field(
        0.97, gt=0, lt=1, description="Weight of what was known, each time more of the same kind is seen"
    )
    prior_sd: float = Field(30.0, gt=0, description="How far off a prior may be, as a multiple of it")
    huber: float = Field(2.0, gt=0, description="Standard deviations from which an observation counts for less")


def _linear(parameters: LinearParameters) -> MakePredictor:
    return lambda num_features: LinearModel(num_features, **parameters.model_dump())


class Fixed:
    """Believes its prior for ever: for comparison, and for times that somebody else has measured."""

    def __init__(self, num_features: int) -> None:
        self._coefficients = np.zeros((0, num_features))
        self._free: list[int] = []

    def add(self, prior: Floats) -> int:
        if not self._free:
            size = len(self._coefficients)
            self._coefficients = np.pad(self._coefficients, ((0, size + 1), (0, 0)))
            self._free = list(range(2 * size, size - 1, -1))
        row = self._free.pop()
        self._coefficients[row] = prior
        return row

    def remove(self, row: int) -> None:
        self._coefficients[row] = 0.0
        self._free.append(row)

    def restart(self, row: int) -> None:
        pass

    def milliseconds(self, rows: Rows | Ints, features: Floats) -> Floats:
        ms: Floats = np.einsum("ij,ij->i", self._coefficients[rows], features)
        return np.clip(np.nan_to_num(ms, nan=0.0), 0.0, LONGEST_MS)

    def observe(self, row: int, features: Floats, seen_ms: float) -> float:
        return float(self.milliseconds(np.array([row]), features[None, :])[0])

    def confidence(self, rows: Rows | Ints) -> Floats:
        return np.zeros(len(rows))

    def counts(self, rows: Rows | Ints) -> Ints:
        return np.zeros(len(rows), np.int64)

    def typical(self, rows: Rows | Ints) -> Floats:
        result: Floats = np.median(self._coefficients[rows], axis=0)
        return result


PREDICTORS: Mapping[str, Plugin[MakePredictor]] = {
    "linear": Plugin(LinearParameters, _linear),
    "prior": Plugin(NoParameters, lambda _: Fixed),
}


def predictors() -> Mapping[str, Plugin[MakePredictor]]:
    """The shipped ones and those of installed distributions."""
    return table("predictors", PREDICTORS)
