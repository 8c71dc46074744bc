"""A sweep's settings as a table, for the terminal and for the report."""

from __future__ import annotations

from typing import Any

from prelora_ray.measures import measure_named
from prelora_ray.words import counted, in_percent, number


def sweep_table(sweep: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of sweep.json: full training, the controls, then the settings from the best on.

    `*` marks the Pareto front of them all. `rate left` is the share of the learning rate's sum at the switch; `full, %`
    and `rank 1, %` are what the controls of a setting come to.
    """
    keys, measure = list(sweep["settings"][0]["setting"]), measure_named(sweep["measure"])
    percent = ", %" if measure.is_share else ""
    controls = {"full_control": f"full{percent}"}
    if any(entry.get("rank_1_control") for entry in sweep["settings"]):
        controls["rank_1_control"] = f"rank 1{percent}"
    values = {trial: measure.cell(value) for trial, value in _of_controls(sweep).items()}

    def row(first: list[str], switch: str, trains: str, entry: dict[str, Any]) -> list[str]:
        ended = entry.get("ended", "finished")
        return [
            *first,
            switch,
            in_percent(entry.get("rate_left")),
            trains,
            number(entry["cost"]),
            measure.cell(entry[measure.key]),
            *(values.get(entry.get(key) or "", "") for key in controls),
            "*" if entry["trial"] in sweep["pareto"] else "" if ended == "finished" else ended or "not run",
            ", ".join(signature.replace("_", " ") for signature in entry.get("diagnosis", [])),
            entry["trial"] if entry.get("message") is None else f"{entry['trial']}: {entry['message']}",
        ]

    rest = [""] * (len(keys) - 1)
    rows = [row(["full", *rest], "-", "100.0", sweep["full"])]
    for entry in sweep["controls"]:
        kind = entry["setting"]["control"]
        if kind == "full":
            rows.append(row([f"full, to {entry['setting']['train.epochs']}", *rest], "-", "100.0", entry))
        else:
            rows.append(row([kind, *rest], str(entry["switch_epoch"]), in_percent(entry["trainable_fraction"]), entry))
    best_first = lambda entry: (entry["ended"] != "finished", -measure.rank(entry[measure.key]))  # noqa: E731
    for entry in sorted(sweep["settings"], key=best_first):
        switch = "never" if entry["switch_epoch"] is None else str(entry["switch_epoch"])
        rows.append(
            row([_value(entry["setting"][key]) for key in keys], switch, in_percent(entry["trainable_fraction"]), entry)
        )
    names = [key.removeprefix("method.") for key in keys]
    told = ["switch", "rate left, %", "trains, %", sweep["unit"], measure.column, *controls.values(), "", "diagnosis", "run"]
    return [*names, *told], rows


def _of_controls(sweep: dict[str, Any]) -> dict[str, float]:
    """What the trunk and the controls that have ended come to, by run: one that has not begins with its trunk's."""
    key = sweep["measure"]
    ended = [entry for entry in sweep["controls"] if entry.get("ended", "finished") == "finished"]
    return {entry["trial"]: entry[key] for entry in [sweep["full"], *ended] if entry[key] is not None}


def told_of_cost(sweep: dict[str, Any]) -> str:
    """How many runs a sweep took, and what they cost, in a sentence."""
    return (
        f"{counted(sweep['trials'], 'run stands', 'runs stand')} for {counted(len(sweep['settings']), 'setting')}, beside "
        f"{counted(len(sweep['controls']), 'control')}: {sweep['cost']:.3g} {sweep['unit']} with the trunk, where each by "
        f"itself would have cost {sweep['naive_cost']:.3g}"
    )


def told_of_controls(sweep: dict[str, Any]) -> str | None:
    """How runs did against full training of equal cost, in a sentence; None where none has such a control."""
    values, measure = _of_controls(sweep), measure_named(sweep["measure"])
    runs = {entry["trial"]: entry for entry in sweep["settings"] if entry.get("full_control") in values}
    if not runs:
        return None
    better = sum(measure.rank(run[measure.key]) > measure.rank(values[run["full_control"]]) for run in runs.values())
    than = "below" if measure.lower_is_better else "above"
    return f"{better} of {counted(len(runs), 'run ends', 'runs end')} {than} full training that costs as much"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
