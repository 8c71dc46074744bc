"""What a run came to, from the records in its folder."""

from __future__ import annotations

from typing import Any

from prelora_ray.run_folder import RunFolder, last_attempt


def summarize(folder: RunFolder) -> dict[str, Any]:
    """The contents of result.json, from the lines that stand.

    Throughput is images over seconds of training, validation not counted. On a GPU
    `peak_memory_bytes` is the most that was allocated in the phase; on a CPU the most that the process
    ever held until then.
    """
    epochs = last_attempt(folder.read_lines("epochs.jsonl"), "epoch")
    events = folder.read_lines("events.jsonl")
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in epochs:
        phases.setdefault(line["phase"], []).append(line)
    validated = [line["val_top1"] for line in epochs if line["val_top1"] is not None]
    switch, freeze = _last(events, "switch"), _last(events, "freeze")
    return {
        "epochs": epochs[-1]["epoch"] + 1,
        "switch_epoch": switch and switch["switch_epoch"],
        "freeze_epoch": freeze and freeze["freeze_epoch"],
        "val_top1": validated[-1] if validated else None,
        "best_val_top1": max(validated, default=None),
        "images_per_second": {
            phase: sum(line["images_per_second"] * line["train_seconds"] for line in lines)
            / sum(line["train_seconds"] for line in lines)
            for phase, lines in phases.items()
        },
        "peak_memory_bytes": {phase: max(line["peak_memory_bytes"] for line in lines) for phase, lines in phases.items()},
        "trainable_fraction": {
            phase: lines[-1]["trainable_parameters"] / lines[-1]["parameters"] for phase, lines in phases.items()
        },
        "ranks": _counts(folder.read_json("ranks.json")) if switch else None,
        "restarts": max((line["attempt"] for line in events), default=0),
        "seconds": sum(_seconds_by_attempt(events).values()),
    }


def _counts(ranks: dict[str, int]) -> dict[str, int]:
    """How many modules have each rank."""
    return {str(rank): list(ranks.values()).count(rank) for rank in sorted(set(ranks.values()))}


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((line for line in reversed(events) if line["event"] == kind), None)


def _seconds_by_attempt(events: list[dict[str, Any]]) -> dict[int, float]:
    """Time from each attempt's first event to its last."""
    times: dict[int, list[float]] = {}
    for line in events:
        times.setdefault(line["attempt"], []).append(line["time"])
    return {attempt: max(at) - min(at) for attempt, at in times.items()}
