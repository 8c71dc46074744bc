"""How a figure grows with the number of workers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CLOSE = 0.1
"""Of the largest value: a fit that comes so close needs no further term."""


@dataclass(frozen=True)
class Growth:
    """`fixed + per_worker * n + per_worker_squared * n**2` for n workers, no term below 0."""

    fixed: float
    per_worker: float
    per_worker_squared: float

    def at(self, workers: float) -> float:
        return self.fixed + self.per_worker * workers + self.per_worker_squared * workers**2


def fit(workers: Sequence[int], values: Sequence[float]) -> Growth:
    """By least squares. Growth with the square of the workers is taken where that without is off by more than a tenth
    of the largest value, and there are enough numbers of workers to tell."""
    highest = min(2, len(workers) - 2) if len(workers) > 2 else len(workers) - 1
    growth = Growth(0.0, 0.0, 0.0)
    for degree in range(min(1, highest), highest + 1):
        growth = _least_squares(workers, values, degree)
        if _error(growth, workers, values) <= _CLOSE * max(values):
            break
    return growth


def _least_squares(workers: Sequence[int], values: Sequence[float], degree: int) -> Growth:
    """The best of all choices of terms up to a degree whose factors are not below 0."""
    powers = np.vander(np.asarray(workers, dtype=float), 3, increasing=True)
    fits = [Growth(0.0, 0.0, 0.0)]
    for chosen in itertools.product((False, True), repeat=degree + 1):
        terms = [power for power, is_chosen in enumerate(chosen) if is_chosen]
        factors = np.zeros(3)
        factors[terms] = np.linalg.lstsq(powers[:, terms], np.asarray(values), rcond=None)[0]
        if (factors >= 0).all():
            fits.append(Growth(*factors.tolist()))
    return min(fits, key=lambda growth: sum((growth.at(n) - value) ** 2 for n, value in zip(workers, values, strict=True)))


def _error(growth: Growth, workers: Sequence[int], values: Sequence[float]) -> float:
    return max(abs(growth.at(n) - value) for n, value in zip(workers, values, strict=True))
