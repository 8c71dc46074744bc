"""What a report says of its runs, or of a sweep, before all else: state, duration, model, hardware and result."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prelora_ray.measures import best_value, last_value, measure_named, measures_of
from prelora_ray.records import BEGINNINGS, Freeze, Switch
from prelora_ray.report.records import ReportedRun
from prelora_ray.summaries import phase_summaries, restarts, seconds_of_run
from prelora_ray.words import counted, number


def facts(runs: list[ReportedRun]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a column a run."""
    told = {"state": _state, "duration": _duration, "model": _model, "hardware": _hardware, "result": _result}
    return ["", *(run.name for run in runs)], [[name, *(tell(run) for run in runs)] for name, tell in told.items()]


def sweep_facts(sweep: dict[str, Any], runs: list[ReportedRun]) -> tuple[list[str], list[list[str]]]:
    """The same of a sweep in one column. `runs`: its own, the trunk first; without them less is known."""
    entries = [*sweep["settings"], *sweep["controls"]]
    ended = Counter({entry["trial"]: entry.get("ended", "finished") or "not run" for entry in entries}.values())
    measure = measure_named(sweep["measure"])
    finished = [entry for entry in [sweep["full"], *entries] if entry.get("ended", "finished") == "finished"]
    best = max(finished, key=lambda entry: measure.rank(entry[measure.key]))
    rows = [["state", ", ".join(f"{counted(count, 'run')} {how}" for how, count in ended.items())]]
    if runs:
        seconds = sum(seconds_of_run(event for event in run.events if event.attempt >= 0) for run in runs)
        own = sum(line.attempt >= 0 for run in runs for line in run.epochs)
        rows.append(["duration", f"{_took(seconds)} for {counted(own, 'epoch')}, of all runs together"])
        rows += [["model", _model(runs[0])], ["hardware", _hardware(runs[0])]]
    told = f"{measure.title} {measure.told(best[measure.key])} by {best['trial']}, at {number(best['cost'])} {sweep['unit']}"
    return ["", "sweep"], [*rows, ["best result", told]]


def _state(run: ReportedRun) -> str:
    return run.state.progress


def _duration(run: ReportedRun) -> str:
    seconds, again = seconds_of_run(run.events), restarts(run.events)
    return f"{_took(seconds)} for {counted(len(run.epochs), 'epoch')}" + (f", {counted(again, 'restart')}" if again else "")


def _took(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _model(run: ReportedRun) -> str:
    model = run.settings.model
    parameters = run.epochs[0].parameters
    told = f"{parameters / 1e6:,.1f} million" if parameters >= 1e6 else f"{parameters:,}"
    takes = "text" if model.takes_text else f"images of {model.image_size} px"
    return f"{model.name} of {told} parameters, {takes}"


def _hardware(run: ReportedRun) -> str:
    sizes = {line.world_size for line in run.epochs}
    workers = f"{min(sizes)} to {max(sizes)} workers" if len(sizes) > 1 else counted(max(sizes), "worker")
    devices = dict.fromkeys(event.device for event in run.events if isinstance(event, BEGINNINGS) and event.device)
    return f"{workers}, {' and '.join(devices) or ('GPU' if run.on_gpu else 'CPU')}"


def _result(run: ReportedRun) -> str:
    switch, freeze = run.last_of(Switch), run.last_of(Freeze)
    first, *others = measures_of(run.settings.task)
    told = []
    if (last := last_value(run.epochs, first.key)) is not None:
        told.append(first.told_with_best(last, best_value(run.epochs, first)))
        told += [f"{measure.title} {measure.told(last_value(run.epochs, measure.key))}" for measure in others]
    told.append("no switch" if switch is None else f"switch after epoch {switch.switch_epoch}")
    if freeze is not None:
        told.append(f"freeze after epoch {freeze.freeze_epoch}")
    lora = phase_summaries(run.epochs).get("lora")
    if lora is not None and lora.against_full is not None:
        told.append(f"phase lora {lora.against_full:.2f} times as fast as full training")
    return ", ".join(told)
