"""The runs of a storage, each with where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prelora_ray.errors import UserError, one_line
from prelora_ray.fault_tolerance.end import read_end
from prelora_ray.fault_tolerance.lock import is_held
from prelora_ray.measures import last_value, measures_of
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import Progress, Starting
from prelora_ray.run_folder import RunFolder
from prelora_ray.summaries import restarts

State = Literal["finished", "training", "starting", "stopped", "failed", "interrupted", "damaged"]


@dataclass(frozen=True)
class RunState:
    """A run as its folder tells it; what it does not tell is None."""

    name: str
    state: State
    """`starting` and `training`: a driver holds it; `stopped`: it was asked to; `failed`: another try would not help;
    `interrupted`: its driver is gone, and the same command goes on; `damaged`: its folder cannot be read."""
    phase: str | None = None
    epoch: int = 0
    """Completed epochs."""
    epochs: int | None = None
    """Epochs of the whole run."""
    val_top1: float | None = None
    """Of the last validation, in 0..1."""
    restarts: int = 0
    time: float | None = None
    """When it last wrote where it is, in seconds since 1970."""
    message: str | None = None
    """What it does before it trains, why it failed, or what is damaged."""
    task: str = "classification"
    """As its recipe names it: which of its measures it has."""
    val_loss: float | None = None
    """Of the last validation, per masked token, as the two that follow."""
    val_accuracy: float | None = None
    val_perplexity: float | None = None


def list_runs(storage: str) -> list[RunState]:
    """The runs directly in a storage, by name. Raises UserError where it is none, or is itself a run."""
    folder = RunFolder(storage)
    if folder.exists("config.yaml"):
        raise UserError(f"{storage!r} is a run folder: give the folder that it lies in")
    if folder.is_local and not Path(folder.path).is_dir():
        raise UserError(f"{storage!r} is no folder: give the one that holds run folders, the recipes' storage")
    runs = [(name, folder / name) for name in folder.list_folders()]
    return [_state(name, run) for name, run in runs if run.exists("config.yaml")]


def _state(name: str, run: RunFolder) -> RunState:
    try:
        return _read(name, run)
    except (UserError, TypeError, OSError) as error:  # one that cannot be read takes no other with it
        return RunState(name, "damaged", message=one_line(error))


def _read(name: str, folder: RunFolder) -> RunState:
    run, place = RunRecords(folder), folder.read_place()
    state, message = _how_it_is(run, place)
    times = [event.time for event in run.events] + ([place.time] if place else [])
    return RunState(
        name,
        state,
        phase=run.events[-1].phase if run.events else None,
        epoch=run.completed,
        epochs=run.settings.train.epochs,
        task=run.settings.task,
        **{measure.key: last_value(run.epochs, measure.key) for measure in measures_of(run.settings.task)},
        restarts=restarts(run.events),
        time=max(times, default=None),
        message=message,
    )


def _how_it_is(run: RunRecords, place: Starting | Progress | None) -> tuple[State, str | None]:
    if run.is_finished:
        return "finished", None
    if is_held(run.folder):
        return ("starting", place.doing) if isinstance(place, Starting) else ("training", None)
    end = read_end(run.folder)
    if end is not None and end.end == "failed":
        return "failed", end.message
    return ("stopped" if end is not None and end.end == "stop" else "interrupted"), None
