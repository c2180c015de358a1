"""Times learned while they are seen: a linear model per row, kept by robust recursive least squares.

A row is a worker or a pair of workers. Its time is the product of non-negative coefficients and features, such as
`[1, tokens, tokens * context]`, with noise that is a share of the time itself. So every observation is divided by that
time before it is fitted: a prompt of ten tokens counts as much as one of a hundred thousand.

- Forgetting is directional (Kulhavy 1987): an observation only replaces what was known of its own features. What was
  learned of long prompts stays through any number of short ones, and the covariance never grows by lack of news.
- Before an observation counts, its surprise is measured: its distance from the prediction in standard deviations, those
  of the noise and of the model's own uncertainty together. What is more surprising than `huber` counts for less.
- `SHIFT_AFTER` such surprises in a row on the same side are no outliers but a worker that has become another: its
  coefficients turn into a prior again, uncertain mostly by a common factor, and a few observations settle them.
"""

import math

import numpy as np
from numpy.typing import NDArray

from omni_proxy.scheduling import kernels

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rows = NDArray[np.intp]

LONGEST_MS = 1e9
"""Predictions end here; what is said to have lasted longer is not believed."""
SHIFT_AFTER = 5
"""Surprises in a row on one side: chance alone makes as many once in a hundred million observations."""
RESTART_SD = 1.0
"""Relative uncertainty of a row that restarted or shifted."""
COMMON = 0.9
"""Share of a prior's variance that is common to all coefficients: an engine is slower at everything, mostly."""
LEAST_SHARE = 0.1
"""A coefficient is uncertain at least by this share of the largest prior that any row was given for it."""
FIRST_NOISE, LEAST_NOISE, MOST_NOISE = 0.1, 0.01, 1.0
"""Relative standard deviation of the noise: assumed at first, and the range in which it is learned."""
NOISE_STEP, ERROR_STEP = 0.05, 0.1
"""Relative steps of the running medians."""
LEAST_ERROR = 1e-4
FIRST_ERRORS = 4
"""Until then the latest error stands for the median: the first ones are the prior's."""
SWEEPS = 5
"""Rounds over the coefficients that look for the likeliest without a negative one."""
MEDIAN_OF_NORMAL = 0.6745
"""Half of all normal deviates are closer to the mean than this many standard deviations."""
ENOUGH_OBSERVATIONS = 5
"""As many observations make a row half confident."""


class LinearModel:
    """Rows of coefficients; every method is vectorised over rows but `observe`, which teaches one of them.

    `prior_sd`: how far off a row's prior may be, as a multiple of it; most of that is common to all of a row's
    coefficients (`COMMON`). `forgetting`: 0.97 remembers about 33 observations of the same kind. `resolution_ms`:
    smaller differences are not worth learning. Features and times are never negative.
    """

    def __init__(
        self,
        num_features: int,
        *,
        forgetting: float = 0.97,
        prior_sd: float = 30.0,
        huber: float = 2.0,
        resolution_ms: float = 0.05,
        non_negative: bool = True,
    ) -> None:
        self._forgetting = forgetting
        self._prior_sd = prior_sd
        self._huber = huber
        self._resolution_ms = resolution_ms
        self._bounded = non_negative
        self._largest_prior = np.zeros(num_features)
        self._free: list[int] = []
        self._coefficients = np.zeros((0, num_features))
        self._estimate = np.zeros((0, num_features))
        """Coefficients as they would be if they could be negative: what the recursion works on."""
        self._covariance = np.zeros((0, num_features, num_features))
        self._noise = np.zeros(0)
        self._error = np.zeros(0)
        self._count = np.zeros(0, np.int64)
        self._surprises = np.zeros(0, np.int64)
        """Surprising observations in a row; negative where they were shorter than predicted."""

    def add(self, prior: Floats, weight: float = 1.0) -> int:
        """A row that starts from these coefficients; a prior of weight 4 is trusted to half of `prior_sd`.

        A feature whose coefficient is zero in every row's prior is never learned.
        """
        if not self._free:
            self._grow()
        row = self._free.pop()
        coefficients = np.nan_to_num(np.asarray(prior, np.float64), posinf=0.0).clip(0.0, LONGEST_MS)
        np.maximum(self._largest_prior, coefficients, out=self._largest_prior)
        self._coefficients[row] = coefficients
        self._noise[row] = FIRST_NOISE
        self._error[row] = 0.0
        self._forget(row, self._prior_sd / math.sqrt(weight))
        return row

    def remove(self, row: int) -> None:
        """The next `add` may give the same number to another."""
        self._coefficients[row] = 0.0
        self._covariance[row] = 0.0
        self._count[row] = 0
        self._free.append(row)

    def restart(self, row: int) -> None:
        """The engine behind the row is a new one: what is known becomes its prior."""
        self._forget(row, RESTART_SD)

    def milliseconds(self, rows: Rows | Ints, features: Floats) -> Floats:
        """What features[i] are predicted to take on rows[i]; never negative, never NaN."""
        return kernels.milliseconds(self._coefficients, rows, features, LONGEST_MS)

    def predict(self, rows: Rows | Ints, features: Floats) -> tuple[Floats, Floats]:
        """`milliseconds` and the standard deviation of what will be seen, noise included."""
        ms = self.milliseconds(rows, features)
        spread = np.einsum("ijk,ik->ij", self._covariance.take(rows, 0), features)
        variance = np.einsum("ij,ij->i", spread, features) + np.square(self._noise.take(rows) * ms)
        return ms, np.sqrt(np.fmin(np.fmax(variance, 0.0), LONGEST_MS**2))

    def observe(self, row: int, features: Floats, seen_ms: float) -> float:
        """Learns from one time; the milliseconds predicted before. Features or times that cannot be teach nothing."""
        predicted = float(self._coefficients[row] @ features)
        if not 0.0 <= predicted <= LONGEST_MS:
            return LONGEST_MS if predicted > LONGEST_MS else 0.0
        if 0.0 < seen_ms <= LONGEST_MS and features.min() >= 0.0:
            self._learn(row, features, predicted, float(seen_ms))
        return predicted

    def confidence(self, rows: Rows | Ints) -> Floats:
        """[0, 1] from how much was observed and how well it was predicted lately; 0: the prior alone."""
        count = self._count[rows]
        result: Floats = count / (count + ENOUGH_OBSERVATIONS) * np.fmax(1.0 - self._error[rows], 0.0)
        return result

    def error(self, rows: Rows | Ints) -> Floats:
        """Running median of |predicted - seen| / seen; 0 before the first observation."""
        return self._error[rows]

    def counts(self, rows: Rows | Ints) -> Ints:
        """Observations since the row was added, restarted or shifted."""
        return self._count[rows]

    def coefficients(self, rows: Rows | Ints) -> Floats:
        """Milliseconds per unit of each feature; one line per row."""
        return self._coefficients[rows]

    def typical(self, rows: Rows | Ints) -> Floats:
        """Each coefficient's median over the more confident of these rows: the prior of a newcomer of the same kind.

        Raises:
            ValueError: no row was given.
        """
        confidence = self.confidence(rows)
        result: Floats = np.median(self._coefficients[rows[confidence >= 0.5 * confidence.max()]], axis=0)
        return result

    def _learn(self, row: int, features: Floats, predicted: float, seen: float) -> None:
        spread = self._covariance[row] @ features
        own = float(features @ spread)
        if not 0.0 < own < LONGEST_MS**4:
            return
        noise = float(self._noise[row])
        # The noise is a share of the true time. That is nearer to what was seen the less is known.
        known = own / (own + noise * noise * max(predicted, 1e-4 * seen) * seen)
        scale = predicted + known * (seen - predicted) + self._resolution_ms
        spread /= scale
        own /= scale * scale
        residual = (seen - predicted) / scale
        surprise = residual / math.sqrt(noise * noise + own)
        self._judge(row, surprise, own, abs(seen - predicted) / seen)
        trust = min(1.0, self._huber / max(abs(surprise), 1e-9))
        forgotten = (1.0 - self._forgetting) * trust
        weight = trust / (noise * noise)
        gain = 1.0 - forgotten + weight * own
        estimate, covariance = self._estimate[row], self._covariance[row]
        residual = (seen - float(estimate @ features)) / scale
        estimate += spread * (weight * residual / gain)
        covariance -= spread[:, None] * (spread * ((weight - forgotten / own) / gain))
        bounded = self._bounded and estimate.min() < 0.0
        self._coefficients[row] = _non_negative(estimate, covariance) if bounded else estimate
        if abs(self._surprises[row]) >= SHIFT_AFTER:
            self._forget(row, RESTART_SD)

    def _judge(self, row: int, surprise: float, own: float, error: float) -> None:
        """Counts the observation and moves the running medians of noise and error a step towards it."""
        noise = float(self._noise[row])
        step = NOISE_STEP * noise * noise / (noise * noise + own)
        noise *= 1.0 + math.copysign(step, abs(surprise) - MEDIAN_OF_NORMAL)
        self._noise[row] = min(max(noise, LEAST_NOISE), MOST_NOISE)
        count = int(self._count[row])
        if count < FIRST_ERRORS:
            self._error[row] = max(error, LEAST_ERROR)
        else:
            factor = 1.0 + max(ERROR_STEP, 2.0 / count)
            self._error[row] *= factor if error > self._error[row] else 1.0 / factor
        self._count[row] = count + 1
        surprises = int(self._surprises[row])
        if abs(surprise) < self._huber:
            self._surprises[row] = 0
        elif surprise > 0.0:
            self._surprises[row] = max(surprises, 0) + 1
        else:
            self._surprises[row] = min(surprises, 0) - 1

    def _forget(self, row: int, relative_sd: float) -> None:
        """Coefficients stay, their covariance becomes a prior's: half common to all, half of each alone."""
        size = np.maximum(self._coefficients[row], LEAST_SHARE * self._largest_prior)
        self._estimate[row] = self._coefficients[row]
        alone = (1.0 - COMMON) * np.diag(size * size)
        self._covariance[row] = relative_sd * relative_sd * (COMMON * np.outer(size, size) + alone)
        self._count[row] = 0
        self._surprises[row] = 0

    def _grow(self) -> None:
        held = len(self._noise)
        size = max(8, 2 * held)
        self._free.extend(range(size - 1, held - 1, -1))
        for name in ("_coefficients", "_estimate", "_covariance", "_noise", "_error", "_count", "_surprises"):
            old = getattr(self, name)
            larger = np.zeros((size, *old.shape[1:]), old.dtype)
            larger[:held] = old
            setattr(self, name, larger)


def _non_negative(estimate: Floats, covariance: Floats) -> Floats:
    """The likeliest coefficients without a negative one, where the unbounded estimate has some (Hildreth 1957)."""
    coefficients = estimate.copy()
    pushed = [0.0] * len(estimate)
    for _ in range(SWEEPS):
        for i, own in enumerate(covariance.diagonal().tolist()):
            push = max(-float(coefficients[i]) / own, -pushed[i]) if own > 0.0 else 0.0
            if push:
                pushed[i] += push
                coefficients += covariance[i] * push
        if coefficients.min() >= 0.0:
            break
    return np.maximum(coefficients, 0.0)
