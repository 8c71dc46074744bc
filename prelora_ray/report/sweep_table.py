"""A sweep's settings as a table, for the terminal and for the report."""

from __future__ import annotations

from typing import Any


def sweep_table(sweep: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of sweep.json: full training, then the settings from the best on; `*` marks the Pareto front."""
    keys = list(sweep["settings"][0]["setting"])
    names = [key.removeprefix("method.") for key in keys]
    head = [*names, "switch", "trains, %", "GPU-hours", "top-1, %", "", "diagnosis", "run"]
    rows = [["full", *[""] * (len(keys) - 1), "-", "100.0", *_cost_and_top1(sweep["full"]), "", "", "trunk"]]
    order = sorted(enumerate(sweep["settings"]), key=lambda item: (item[1]["ended"] != "finished", -(item[1]["val_top1"] or 0)))
    for index, entry in order:
        share = entry["trainable_fraction"]
        rows.append(
            [
                *(_value(entry["setting"][key]) for key in keys),
                "never" if entry["switch_epoch"] is None else str(entry["switch_epoch"]),
                "-" if share is None else f"{100 * share:.1f}",
                *_cost_and_top1(entry),
                "*" if index in sweep["pareto"] else "" if entry["ended"] == "finished" else entry["ended"] or "not run",
                ", ".join(signature.replace("_", " ") for signature in entry["diagnosis"]),
                entry["trial"] if entry["message"] is None else f"{entry['trial']}: {entry['message']}",
            ]
        )
    return head, rows


def _cost_and_top1(entry: dict[str, Any]) -> tuple[str, str]:
    hours, top1 = entry["gpu_hours"], entry["val_top1"]
    return "-" if hours is None else f"{hours:.4g}", "-" if top1 is None else f"{100 * top1:.2f}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
