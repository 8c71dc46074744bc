"""What a task is validated by: numbers that each epoch records, by name, and that everything shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from prelora_ray.records import EpochLine
from prelora_ray.words import in_percent, number, percent


@dataclass(frozen=True)
class Measure:
    key: str
    """The field of an `EpochLine` that holds it: `val_top1`."""
    title: str
    """What a person calls it: `top-1`."""
    is_share: bool
    """Whether it is a share in 0..1, which a person gets in percent."""
    lower_is_better: bool = False
    averaged: str | None = None
    """The field with that of the averaged weights; None where it is not recorded."""

    def score(self, value: float) -> float:
        """The value, or its negative where a lower one is better: the higher, the better."""
        return -value if self.lower_is_better else value

    def rank(self, value: float | None) -> float:
        """As `score`; what is not known is worse than all that is."""
        return -math.inf if value is None else self.score(value)

    def best(self, values: Iterable[float]) -> float | None:
        """None where there is none."""
        return max(values, key=self.score, default=None)

    def told(self, value: float | None) -> str:
        """`97.5%`, `12.3`."""
        return percent(value) if self.is_share else number(value)

    def told_with_best(self, last: float | None, best: float | None) -> str:
        """`top-1 97.5% (best 98.1%)`."""
        return f"{self.title} -" if last is None else f"{self.title} {self.told(last)} (best {self.told(best)})"

    @property
    def column(self) -> str:
        """Head of a column: `top-1, %`."""
        return f"{self.title}, %" if self.is_share else self.title

    def cell(self, value: float | None) -> str:
        """Of that column."""
        return in_percent(value, 2) if self.is_share else number(value)


_MEASURES = {
    "classification": (Measure("val_top1", "top-1", is_share=True, averaged="ema_top1"),),
    "mlm": (
        Measure("val_perplexity", "perplexity", is_share=False, lower_is_better=True, averaged="ema_perplexity"),
        Measure("val_loss", "loss per masked token", is_share=False, lower_is_better=True),
        Measure("val_accuracy", "accuracy", is_share=True),
    ),
}

MEASURED = tuple(measure.key for measures in _MEASURES.values() for measure in measures)
"""All fields of an `EpochLine` that hold one."""


def measures_of(task: str) -> tuple[Measure, ...]:
    """What runs of a task (a recipe's `task`) are told by. The first is the one that runs are compared by."""
    return _MEASURES[task]


def measure_named(key: str) -> Measure:
    """The measure that a field of an `EpochLine` holds."""
    return next(measure for measures in _MEASURES.values() for measure in measures if measure.key == key)


def last_value(epochs: Iterable[EpochLine], key: str | None) -> float | None:
    """The newest number in a field of the lines; None where no line has one, or there is no such field."""
    values = [] if key is None else [value for line in epochs if (value := getattr(line, key)) is not None]
    return values[-1] if values else None


def best_value(epochs: Iterable[EpochLine], measure: Measure) -> float | None:
    """None where no epoch was validated."""
    return measure.best(value for line in epochs if (value := getattr(line, measure.key)) is not None)
