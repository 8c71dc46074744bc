"""The failure signatures of a switched run, as rules over its records (one object an epoch, docs/run-folder.md)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Signature = Literal["early_switch", "insufficient_warmup", "uniform_ranks"]

LEVEL_PERCENT = 5.0
"""How far above the trunk's extrapolated curve the loss must end to be called levelled off."""
SCATTERS = 2.0
"""And how many times the scatter of the losses around that curve it must be."""
JUMP_PERCENT = 2.0
"""Smallest rise of the loss at the freeze that is called a jump."""
JUMP_SPREADS = 3.0
"""And how many times the usual change from epoch to epoch it must be."""
UNIFORM_SHARE = 0.9
"""Share of the modules at one rank from which on ranks are called uniform."""
_LOOK_BACK = 10
"""Epochs in front of the freeze that tell the usual change of the loss."""
_FEWEST = 4
"""Epochs that a curve is fitted to, or judged by, at least."""


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


def diagnose(epochs: Sequence[Mapping[str, Any]], ranks: Mapping[str, int] | None, num_choices: int) -> list[Finding]:
    """What a run's records show.

    `epochs`: objects with "epoch", "phase", "loss" and "learning_rate", in order. `num_choices`: how many ranks there
    were to choose from.
    """
    findings = [_early_switch(epochs), _insufficient_warmup(epochs), _uniform_ranks(ranks, num_choices)]
    return [finding for finding in findings if finding is not None]


def _early_switch(epochs: Sequence[Mapping[str, Any]]) -> Finding | None:
    """After the switch the loss levels off above the trunk's curve.

    The curve is a power law of the learning rate spent so far, fitted to the second half of phase full. It bends with
    the schedule, and a rate that decays lowers the loss further, so a run that keeps up with its trunk ends under it.
    """
    full = [line for line in epochs if line["phase"] == "full"]
    lora = [line for line in epochs if line["phase"] == "lora"]
    if len(full) < 2 * _FEWEST or len(lora) < _FEWEST:
        return None
    rates = itertools.accumulate(line["learning_rate"] for line in epochs)
    spent = {line["epoch"]: rate for line, rate in zip(epochs, rates, strict=True)}
    points = [(math.log(spent[line["epoch"]]), math.log(line["loss"])) for line in full[len(full) // 2 :]]
    intercept, slope = _line_through(points)
    scatter = math.sqrt(sum((y - intercept - slope * x) ** 2 for x, y in points) / len(points)) * 100
    limit = max(LEVEL_PERCENT, SCATTERS * scatter)
    last = lora[-_FEWEST:]
    expected = sum(math.exp(intercept + slope * math.log(spent[line["epoch"]])) for line in last) / len(last)
    found = sum(line["loss"] for line in last) / len(last)
    percent = (found / expected - 1) * 100
    if percent <= limit:
        return None
    return Finding(
        "early_switch",
        percent,
        limit,
        f"early switch: the loss of the last {len(last)} epochs, {found:.4g}, is {percent:.1f} % above where phase full's "
        f"curve would stand ({expected:.4g}; up to {limit:.1f} % is usual for this run), so the switch after epoch "
        f"{full[-1]['epoch'] + 1} may have come too early: try a smaller tau or zeta, or more windows",
    )


def _insufficient_warmup(epochs: Sequence[Mapping[str, Any]]) -> Finding | None:
    """The loss rises in the first epoch after the freeze, by more than it usually moves."""
    after = next((i for i, line in enumerate(epochs) if line["phase"] == "lora"), 0)
    if after < _FEWEST:
        return None
    losses = [line["loss"] for line in epochs[max(0, after - _LOOK_BACK) : after]]
    usual = [abs(b / a - 1) * 100 for a, b in itertools.pairwise(losses)]
    limit = max(JUMP_PERCENT, JUMP_SPREADS * sum(usual) / len(usual))
    jump = (epochs[after]["loss"] / losses[-1] - 1) * 100
    if jump <= limit:
        return None
    warmup = sum(line["phase"] == "warmup" for line in epochs)
    return Finding(
        "insufficient_warmup",
        jump,
        limit,
        f"insufficient warmup: in the first epoch after the freeze the loss rose by {jump:.1f} % (up to {limit:.1f} % is "
        f"usual for this run); {warmup} epochs of warmup may be too few: try more, or a smaller "
        "method.adapter_learning_rate_scale",
    )


def _uniform_ranks(ranks: Mapping[str, int] | None, num_choices: int) -> Finding | None:
    """Nearly every module sits at one rank, so the budget is not spent where the change is."""
    if not ranks or num_choices < 2:
        return None
    values = list(ranks.values())
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


def _line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope
