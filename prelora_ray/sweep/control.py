"""What a sweep trains beside its runs, so that they are not taken for more than they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prelora_ray.measures import Measure
from prelora_ray.recorded.replay import Record
from prelora_ray.sweep.cost import Prices, pareto_front
from prelora_ray.sweep.outcome import outcome
from prelora_ray.sweep.settings import Candidate, Plan

Entry = dict[str, Any]
"""What sweep.json says of a candidate."""


def name_controls(plan: Plan, entries: list[Entry], trunk: Record, prices: Prices) -> list[Candidate]:
    """Adds to the entries of candidates which runs are their controls, `full_control` and `rank_1_control`, and returns
    the controls that are to be trained, each once.

    The trunk is the control of a run that costs as much. A run that has not finished has none yet.
    """
    wanted = plan.sweep.controls
    controls: dict[str, Candidate] = {}
    switched = [entry for entry in entries if entry["ended"] == "finished" and entry["switch_epoch"] is not None]
    front = on_front(plan.measure, switched)
    costs = {after: full_training_costs(plan, prices, after) for after in {entry["switch_epoch"] for entry in switched}}
    for entry in entries:
        entry |= {"full_control": None, "rank_1_control": None}
    for entry in switched:
        candidate = full_training_of_cost(costs[entry["switch_epoch"]], entry["switch_epoch"], entry["cost"])
        if candidate is None:
            entry["full_control"] = plan.trunk.name
        elif wanted.full == "all" or (wanted.full == "front" and entry["trial"] in front):
            entry["full_control"] = outcome(plan, candidate, trunk).trial
            controls[entry["full_control"]] = candidate
        if entry["rate_left"] <= wanted.rank_1:
            candidate = _of_rank_1(entry["setting"])
            entry["rank_1_control"] = outcome(plan, candidate, trunk).trial
            controls.setdefault(entry["rank_1_control"], candidate)
    return list(controls.values())


def full_training_costs(plan: Plan, prices: Prices, after: int) -> dict[int, float]:
    """Costs of full training that leaves the trunk after so many epochs, by the epoch that it ends after; the last one
    is the trunk's own."""
    epochs = plan.trunk.train.epochs
    costs = {end: prices.full(plan.full_training(after, end, "check")) for end in range(after + 1, epochs)}
    return {**costs, epochs: prices.full(plan.trunk)}


def full_training_of_cost(costs: Mapping[int, float], after: int, cost: float) -> Candidate | None:
    """Full training that leaves the trunk after so many epochs and ends where its cost comes closest; None is the trunk
    itself. `costs`: those of `full_training_costs`."""
    end = min(costs, key=lambda end: abs(costs[end] - cost))
    return None if end == max(costs) else {"control": "full", "train.bend.after": after, "train.epochs": end}


def on_front(measure: Measure, entries: list[Entry]) -> list[str]:
    """The runs of the Pareto front of finished ones, the cheapest first."""
    return [entries[i]["trial"] for i in pareto_front((measure.rank(entry[measure.key]), entry["cost"]) for entry in entries)]


def _of_rank_1(candidate: Candidate) -> Candidate:
    return {**candidate, "control": "rank 1", "method.r_min": 1, "method.r_max": 1, "method.rank_pattern": None}
