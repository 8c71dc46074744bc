"""What a report says of its runs before all else: state, duration, model, hardware and result."""

from __future__ import annotations

from prelora_ray.records import BEGINNINGS, Freeze, Switch
from prelora_ray.report.records import ReportedRun
from prelora_ray.summaries import best_top1, last_top1, phase_summaries, restarts, seconds_of_run
from prelora_ray.words import accuracy, counted


def facts(runs: list[ReportedRun]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a column a run."""
    told = {"state": _state, "duration": _duration, "model": _model, "hardware": _hardware, "result": _result}
    return ["", *(run.name for run in runs)], [[name, *(tell(run) for run in runs)] for name, tell in told.items()]


def _state(run: ReportedRun) -> str:
    return run.state.progress


def _duration(run: ReportedRun) -> str:
    seconds, again = seconds_of_run(run.events), restarts(run.events)
    took = (
        f"{seconds:,.0f} s"
        if seconds < 600
        else f"{seconds / 60:,.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:,.1f} h"
    )
    return f"{took} for {counted(len(run.epochs), 'epoch')}" + (f", {counted(again, 'restart')}" if again else "")


def _model(run: ReportedRun) -> str:
    model = run.settings.model
    parameters = run.epochs[0].parameters
    told = f"{parameters / 1e6:,.1f} million" if parameters >= 1e6 else f"{parameters:,}"
    return f"{model.name} of {told} parameters, images of {model.image_size} px"


def _hardware(run: ReportedRun) -> str:
    sizes = {line.world_size for line in run.epochs}
    workers = f"{min(sizes)} to {max(sizes)} workers" if len(sizes) > 1 else counted(max(sizes), "worker")
    devices = dict.fromkeys(event.device for event in run.events if isinstance(event, BEGINNINGS) and event.device)
    return f"{workers}, {' and '.join(devices) or ('GPU' if run.on_gpu else 'CPU')}"


def _result(run: ReportedRun) -> str:
    switch, freeze = run.last_of(Switch), run.last_of(Freeze)
    told = [] if (top1 := last_top1(run.epochs)) is None else [accuracy(top1, best_top1(run.epochs))]
    told.append("no switch" if switch is None else f"switch after epoch {switch.switch_epoch}")
    if freeze is not None:
        told.append(f"freeze after epoch {freeze.freeze_epoch}")
    lora = phase_summaries(run.epochs).get("lora")
    if lora is not None and lora.against_full is not None:
        told.append(f"phase lora {lora.against_full:.2f} times as fast as full training")
    return ", ".join(told)
