"""How well candidates for the criterion of a switch tell what a switch will lose, and where each would have switched.

    python benchmarks/criteria.py LINES... [--bound recovery=0.9 ...]

LINES are files of `side_by_side.py`, with trunks that have `criteria` and go to their end, and for each of them forks
that leave it after several epochs and switch there; all forks of a trunk are taken to differ in nothing else, and those
with a `rule` of ranks, or an `error`, are left out. For each trunk and criterion (`switch_criteria.py` tells them) it
prints a line of JSON: the number of forks, and Spearman's correlation of the criterion, at the last window that was
over when a fork left, with what the fork lacks at its end against the trunk: in points of top-1 (`top1_lost`) and in
training loss (`loss_more`). A criterion that is low where a switch is due tells much where these are near 1, and
`recovery`, which is high, where they are near -1. Within one trunk whatever falls from epoch to epoch does as well as
`rate_left`, so that the lines of trunk "all", with the forks of all trunks as one, are those to compare: over trunks of
other schedules and weight decays.

With a bound for a criterion, a line says `switch` too, the epochs behind which it would have switched: those of the
first window behind the learning rate's ramp where it is at the bound or beyond; and what the fork from there lacks,
where there is one. A criterion is left out of a correlation where it is null, and a correlation is null where there are
fewer than 3 forks or all are alike.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

CRITERIA = {
    "recovery": "high",
    "effective_perturbation": "low",
    "stable_rank_slope": "low",
    "remaining_gain": "low",
    "norm_change": "low",
    "rate_left": "low",
}
"""By name, what it is where a switch is due."""
_FEWEST = 3
"""Forks that a correlation takes."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Fork:
    after: int
    window: Line
    """The last one of its trunk that was over when it left."""
    top1_lost: float
    """Points that it lacks at its end against its trunk."""
    loss_more: float
    """Training loss of its last epoch, over its trunk's."""


@dataclass(frozen=True)
class Trunk:
    name: str
    seed: int
    windows: list[Line]
    forks: list[Fork]


def read_trunks(files: Sequence[Sequence[Line]]) -> list[Trunk]:
    """Trunks with criteria, of the lines of each file.

    Raises ValueError where a fork ends at another epoch than its trunk or leaves it before its first window is over.
    """
    trunks = []
    for lines in files:
        ended = {(line["run"], line["seed"]) for line in lines if "error" in line}
        epochs: dict[tuple[str, int], list[Line]] = {}
        windows: dict[tuple[str, int], list[Line]] = {}
        for line in lines:
            if (line["run"], line["seed"]) in ended:
                continue
            (windows if "window" in line else epochs).setdefault((line["run"], line["seed"]), []).append(line)
        for (name, seed), of_trunk in windows.items():
            end = epochs[name, seed][-1]
            firsts = ((of_run, of_run[0]) for (_, of), of_run in epochs.items() if of == seed)
            forks = [of_run for of_run, first in firsts if first.get("of") == name and "rule" not in first]
            trunks.append(Trunk(name, seed, of_trunk, [_fork(of_run, end, of_trunk) for of_run in forks]))
    return trunks


def _fork(lines: list[Line], end: Line, windows: list[Line]) -> Fork:
    """`end`: the last epoch of its trunk."""
    name, after, last = lines[0]["run"], lines[0]["epoch"], lines[-1]
    if last["epoch"] != end["epoch"]:
        raise ValueError(f"{name} ends with epoch {last['epoch']}, and {end['run']} with epoch {end['epoch']}")
    over = [window for window in windows if window["epoch_end"] <= after]
    if not over:
        raise ValueError(f"{name} leaves {end['run']} after {after} epochs, before its first window is over")
    return Fork(after, over[-1], 100 * (end["top1"] - last["top1"]), last["loss"] - end["loss"])


def correlations(criterion: str, forks: Sequence[Fork]) -> dict[str, Any]:
    """Spearman's, of a criterion with each measure of what a switch loses."""
    known = [fork for fork in forks if fork.window[criterion] is not None]
    values = [fork.window[criterion] for fork in known]
    return {
        "forks": len(known),
        "top1_lost": _spearman(values, [fork.top1_lost for fork in known]),
        "loss_more": _spearman(values, [fork.loss_more for fork in known]),
    }


def _spearman(values: Sequence[float], others: Sequence[float]) -> float | None:
    if len(values) < _FEWEST or len(set(values)) == 1 or len(set(others)) == 1:
        return None
    return round(float(spearmanr(values, others).statistic), 4)


def chosen(criterion: str, bound: float, trunk: Trunk) -> dict[str, Any]:
    """Where a criterion would have switched with a bound; `switch` is None where it never would."""
    sign = 1 if CRITERIA[criterion] == "high" else -1
    for window in trunk.windows:
        value = window[criterion]
        if not window["in_ramp"] and value is not None and sign * value >= sign * bound:
            there = next((fork for fork in trunk.forks if fork.after == window["epoch_end"]), None)
            lost = {} if there is None else {"switch_top1_lost": there.top1_lost, "switch_loss_more": there.loss_more}
            return {"bound": bound, "switch": window["epoch_end"], **lost}
    return {"bound": bound, "switch": None}


def compare(trunks: Sequence[Trunk], bounds: Mapping[str, float]) -> Iterator[Line]:
    """A line for each trunk and criterion, and for all trunks as one."""
    for criterion in CRITERIA:
        for trunk in trunks:
            line = {"criterion": criterion, "trunk": trunk.name, "seed": trunk.seed, **correlations(criterion, trunk.forks)}
            yield line | (chosen(criterion, bounds[criterion], trunk) if criterion in bounds else {})
        every = [fork for trunk in trunks for fork in trunk.forks]
        yield {"criterion": criterion, "trunk": "all", **correlations(criterion, every)}


def _bound(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in CRITERIA or math.isnan(number := float(value)):
        raise ValueError(text)
    return name, number


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("lines", nargs="+", type=Path)
    parser.add_argument("--bound", dest="bounds", action="append", default=[], type=_bound, metavar="CRITERION=VALUE")
    options = parser.parse_args()
    contents = [[json.loads(line) for line in path.read_text().splitlines()] for path in options.lines]
    for found in compare(read_trunks(contents), dict(options.bounds)):
        print(json.dumps(found))
