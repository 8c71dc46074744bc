"""A sweep's settings as a table, for the terminal and for the report."""

from __future__ import annotations

from typing import Any

from prelora_ray.words import counted, in_percent, number


def sweep_table(sweep: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of sweep.json: full training, the controls, then the settings from the best on.

    `*` marks the Pareto front of them all. `rate left` is the share of the learning rate's sum at the switch; `full, %`
    and `rank 1, %` are what the controls of a setting come to.
    """
    keys = list(sweep["settings"][0]["setting"])
    controls = {"full_control": "full, %"}
    if any(entry.get("rank_1_control") for entry in sweep["settings"]):
        controls["rank_1_control"] = "rank 1, %"
    top1 = {trial: in_percent(value, 2) for trial, value in _of_controls(sweep).items()}

    def row(first: list[str], switch: str, trains: str, entry: dict[str, Any]) -> list[str]:
        ended = entry.get("ended", "finished")
        return [
            *first,
            switch,
            in_percent(entry.get("rate_left")),
            trains,
            number(entry["cost"]),
            in_percent(entry["val_top1"], 2),
            *(top1.get(entry.get(key) or "", "") for key in controls),
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
    for entry in sorted(sweep["settings"], key=lambda entry: (entry["ended"] != "finished", -(entry["val_top1"] or 0))):
        switch = "never" if entry["switch_epoch"] is None else str(entry["switch_epoch"])
        rows.append(
            row([_value(entry["setting"][key]) for key in keys], switch, in_percent(entry["trainable_fraction"]), entry)
        )
    names = [key.removeprefix("method.") for key in keys]
    told = ["switch", "rate left, %", "trains, %", sweep["unit"], "top-1, %", *controls.values(), "", "diagnosis", "run"]
    return [*names, *told], rows


def _of_controls(sweep: dict[str, Any]) -> dict[str, float]:
    """Top-1 by run of the trunk and of the controls that have ended: one that has not begins with its trunk's."""
    ended = [entry for entry in sweep["controls"] if entry.get("ended", "finished") == "finished"]
    return {entry["trial"]: entry["val_top1"] for entry in [sweep["full"], *ended] if entry["val_top1"] is not None}


def told_of_cost(sweep: dict[str, Any]) -> str:
    """How many runs a sweep took, and what they cost, in a sentence."""
    return (
        f"{counted(sweep['trials'], 'run stands', 'runs stand')} for {counted(len(sweep['settings']), 'setting')}, beside "
        f"{counted(len(sweep['controls']), 'control')}: {sweep['cost']:.3g} {sweep['unit']} with the trunk, where each by "
        f"itself would have cost {sweep['naive_cost']:.3g}"
    )


def told_of_controls(sweep: dict[str, Any]) -> str | None:
    """How runs did against full training of equal cost, in a sentence; None where none has such a control."""
    top1 = _of_controls(sweep)
    runs = {entry["trial"]: entry for entry in sweep["settings"] if entry.get("full_control") in top1}
    if not runs:
        return None
    better = sum(entry["val_top1"] > top1[entry["full_control"]] for entry in runs.values())
    return f"{better} of {counted(len(runs), 'run ends', 'runs end')} above full training that costs as much"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
