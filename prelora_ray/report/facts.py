"""What a report says of its runs before all else: state, duration, model, hardware and result."""

from __future__ import annotations

from prelora_ray.records import BEGINNINGS, Freeze, Switch
from prelora_ray.report.records import RunRecords
from prelora_ray.summaries import last_top1, phase_summaries, seconds_by_attempt, top1s
from prelora_ray.words import counted


def facts(runs: list[RunRecords]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a column a run."""
    told = {"state": _state, "duration": _duration, "model": _model, "hardware": _hardware, "result": _result}
    return ["", *(run.name for run in runs)], [[name, *(tell(run) for run in runs)] for name, tell in told.items()]


def _state(run: RunRecords) -> str:
    return run.state.progress


def _duration(run: RunRecords) -> str:
    seconds = sum(seconds_by_attempt(run.events).values())
    restarts = max((event.attempt for event in run.events), default=0)
    took = (
        f"{seconds:,.0f} s"
        if seconds < 600
        else f"{seconds / 60:,.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:,.1f} h"
    )
    return f"{took} for {counted(len(run.epochs), 'epoch')}" + (f", {counted(restarts, 'restart')}" if restarts else "")


def _model(run: RunRecords) -> str:
    model = run.settings.model
    parameters = run.epochs[0].parameters
    told = f"{parameters / 1e6:,.1f} million" if parameters >= 1e6 else f"{parameters:,}"
    return f"{model.name} of {told} parameters, images of {model.image_size} px"


def _hardware(run: RunRecords) -> str:
    sizes = {line.world_size for line in run.epochs}
    workers = f"{min(sizes)} to {max(sizes)} workers" if len(sizes) > 1 else counted(max(sizes), "worker")
    devices = dict.fromkeys(event.device for event in run.events if isinstance(event, BEGINNINGS) and event.device)
    return f"{workers}, {' and '.join(devices) or ('GPU' if run.on_gpu else 'CPU')}"


def _result(run: RunRecords) -> str:
    told = []
    if (top1 := last_top1(run.epochs)) is not None:
        told.append(f"top-1 {top1:.1%} (best {max(top1s(run.epochs)):.1%})")
    switches, freezes = run.events_of(Switch), run.events_of(Freeze)
    told.append(f"switch after epoch {switches[-1].switch_epoch}" if switches else "no switch")
    if freezes:
        told.append(f"freeze after epoch {freezes[-1].freeze_epoch}")
    lora = phase_summaries(run.epochs).get("lora")
    if lora is not None and lora.against_full is not None:
        told.append(f"phase lora {lora.against_full:.2f} times as fast as full training")
    return ", ".join(told)
