"""The failure signatures of a switched run, as rules over what was recorded of its epochs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Signature = Literal["early_switch", "insufficient_warmup", "uniform_ranks"]

LEVEL_PERCENT = 5.0
"""The loss has levelled off if it falls further than this behind the trunk's curve, ..."""
ERRORS = 3.0
"""... and further than so many standard errors of the two slopes together."""
JUMP_PERCENT = 2.0
"""The loss has jumped if it rises by more than this at the freeze, ..."""
JUMP_SPREADS = 3.0
"""... and by more than so many times its usual change from epoch to epoch."""
UNIFORM_SHARE = 0.9
"""Ranks are uniform if at least this share of the modules has the same one."""
_LOOK_BACK = 10
"""Epochs before the freeze that give the usual change of the loss."""
_FEWEST = 4
"""Fewest epochs that a line is fitted to."""
_LARGEST_EXPONENT = 100.0
"""Largest exponent that is turned into a percentage: a loss close to 0 leads to a far larger one."""


class Epoch(Protocol):
    """What is read of an epoch's record."""

    @property
    def epoch(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def loss(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True)
class Finding:
    """A failure signature that a run shows."""

    signature: Signature
    value: float
    """The number that triggered it, in percent."""
    limit: float
    """What it should not have exceeded, in percent."""
    message: str
    """All of it in words, with what to try."""


def diagnose(epochs: Sequence[Epoch], ranks: Mapping[str, int] | None, num_choices: int) -> list[Finding]:
    """What a run's records show.

    `epochs`: in order. `num_choices`: how many ranks there were to choose from.
    """
    findings = [_early_switch(epochs), _insufficient_warmup(epochs), _uniform_ranks(ranks, num_choices)]
    return [finding for finding in findings if finding is not None]


def _early_switch(epochs: Sequence[Epoch]) -> Finding | None:
    """After the freeze the loss levels off above the trunk's extrapolated curve.

    The curve is exponential in the learning rate spent, with the slope of the last third of phase full. So it bends
    with the schedule, and as a rate that decays lowers the loss further, a run that keeps up with its trunk ends under
    it. Images of another size move the loss by themselves, so that of both phases only the last size counts.
    """
    full = [line for line in epochs if line.phase == "full"]
    if len(full) < 2 * _FEWEST:
        return None
    frozen = [line for line in epochs if line.phase == "lora"]
    rates = itertools.accumulate(line.learning_rate for line in epochs)
    spent = {line.epoch: rate for rate, line in zip(rates, epochs, strict=True)}
    trunk, lora = (
        [(spent[line.epoch], math.log(line.loss)) for line in _of_last_size(part) if line.loss > 0] for part in (full, frozen)
    )
    trunk = trunk[-max(_FEWEST, len(full) // 3) :]
    if any(len(part) < _FEWEST or part[0][0] == part[-1][0] for part in (trunk, lora)):  # or no learning rate was spent
        return None
    before, after = _line_through(trunk), _line_through(lora)
    length = lora[-1][0] - lora[0][0]
    percent = math.expm1(min((after.slope - before.slope) * length, _LARGEST_EXPONENT)) * 100
    limit = max(LEVEL_PERCENT, ERRORS * math.hypot(before.error, after.error) * length * 100)
    if percent <= limit:
        return None
    return Finding(
        "early_switch",
        percent,
        limit,
        f"early switch: over {len(lora)} epochs of phase lora the loss has fallen {percent:.1f} % behind the pace of phase "
        f"full (up to {limit:.1f} % is within this run's noise), so the switch after epoch {full[-1].epoch + 1} may have "
        "come too early: try a smaller tau or zeta, more windows, or larger ranks",
    )


def _insufficient_warmup(epochs: Sequence[Epoch]) -> Finding | None:
    """The loss rises in the first epoch after the freeze, by more than is usual with images of the same size."""
    after = next((i for i, line in enumerate(epochs) if line.phase == "lora"), 0)
    losses = [line.loss for line in _of_last_size(epochs[max(0, after - _LOOK_BACK) : after + 1])[:-1]]
    if len(losses) < _FEWEST or not all(losses):  # from a loss of 0 there is no rise in percent
        return None
    usual = [abs(b / a - 1) * 100 for a, b in itertools.pairwise(losses)]
    limit = max(JUMP_PERCENT, JUMP_SPREADS * sum(usual) / len(usual))
    jump = (epochs[after].loss / losses[-1] - 1) * 100
    if jump <= limit:
        return None
    warmup = sum(line.phase == "warmup" for line in epochs)
    return Finding(
        "insufficient_warmup",
        jump,
        limit,
        f"insufficient warmup: in the first epoch after the freeze the loss rose by {jump:.1f} % (up to {limit:.1f} % is "
        f"usual for this run); method.warmup_epochs = {warmup} may be too few, or "
        "method.adapter_learning_rate_scale too large: unless the loss is back within a few epochs, try more, or a smaller one",
    )


def _uniform_ranks(ranks: Mapping[str, int] | None, num_choices: int) -> Finding | None:
    """Nearly every module sits at one rank, so the budget is not spent where the change is."""
    if not ranks or num_choices < 2:
        return None
    values = [rank for rank in ranks.values() if rank]
    rank = max(set(values), key=values.count)
    share = values.count(rank) / len(values)
    if share < UNIFORM_SHARE:
        return None
    return Finding(
        "uniform_ranks",
        share * 100,
        UNIFORM_SHARE * 100,
        f"uniform ranks: {share:.0%} of the modules have rank {rank} (under {UNIFORM_SHARE:.0%} is usual), so the budget is "
        "not spent where the change is: try method.normalize: family, or another range of ranks",
    )


def _of_last_size(epochs: Sequence[Epoch]) -> list[Epoch]:
    """The last epochs, as far back as their images have one size."""
    return list(itertools.takewhile(lambda line: line.image_size == epochs[-1].image_size, reversed(epochs)))[::-1]


@dataclass(frozen=True)
class _Line:
    slope: float
    error: float
    """Standard error of the slope."""


def _line_through(points: Sequence[tuple[float, float]]) -> _Line:
    """The least-squares line."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    squares = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return _Line(slope, math.sqrt(squares / (len(points) - 2) / spread))
