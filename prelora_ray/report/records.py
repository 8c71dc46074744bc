"""What a report shows: the records of runs and of a sweep, read from their folders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from prelora_ray.config import comparable
from prelora_ray.errors import UserError
from prelora_ray.recorded.remarks import Remarks, remarks_on
from prelora_ray.recorded.run import RunRecords
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import absolute


class ReportedRun(RunRecords):
    """A run's records, and what a report says of them."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        super().__init__(folder)
        self.name = name
        """Tells it from the others of the report: the end of its folder's path."""

    @cached_property
    def state(self) -> Remarks:
        return remarks_on(self)

    @property
    def done(self) -> list[int]:
        """Numbers of completed epochs, one for each line of `epochs`."""
        return [line.epoch + 1 for line in self.epochs]

    def phase_bounds(self) -> list[tuple[str, int, int]]:
        """(phase, epochs completed at its begin, and at its end), in order."""
        bounds: list[tuple[str, int, int]] = []
        for line in self.epochs:
            if not bounds or bounds[-1][0] != line.phase:
                bounds.append((line.phase, line.epoch, line.epoch + 1))
            bounds[-1] = (*bounds[-1][:2], line.epoch + 1)
        return bounds

    def size_changes(self) -> list[tuple[int, int, int]]:
        """(epochs completed, side of the training images before, and after), in order; of epochs that recorded it."""
        pairs = itertools.pairwise((line.epoch, line.image_size) for line in self.epochs if line.image_size is not None)
        return [(epoch, before, after) for (_, before), (epoch, after) in pairs if before != after]


def read_runs(paths: Sequence[str]) -> list[ReportedRun]:
    """Raises UserError as `read_run` does."""
    paths = list(dict.fromkeys(map(absolute, paths)))
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """For each path its shortest end, in whole parts, that no other one has: `digits`, or `a/digits` and `b/digits`."""
    parts = [path.rstrip("/").split("/") for path in paths]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


def read_run(path: str, name: str) -> ReportedRun:
    """Raises UserError where the folder holds no run, or one that has not finished an epoch."""
    run = ReportedRun(RunFolder(path), name)
    if not run.epochs:
        raise UserError(f"{path} has nothing to report yet: no epoch of {run.settings.train.epochs} is done")
    return run


def read_sweep(path: str) -> dict[str, Any] | None:
    """The contents of sweep.json; None where the folder holds no sweep."""
    folder = RunFolder(path)
    return _with_keys_of_now(folder.read_json("sweep.json")) if folder.exists("sweep.json") else None


def runs_of_sweep(path: str, sweep: dict[str, Any]) -> list[ReportedRun]:
    """Those that have finished an epoch, the trunk first; none where sweep.json lies alone."""
    trials = dict.fromkeys(entry["trial"] for entry in [sweep["full"], *sweep["settings"], *sweep["controls"]])
    runs = [ReportedRun(RunFolder(path) / trial, trial) for trial in trials]
    return [run for run in runs if run.folder.exists("config.yaml") and run.epochs]


def _with_keys_of_now(sweep: dict[str, Any]) -> dict[str, Any]:
    """A sweep that an earlier version wrote: without its measure, which is top-1; or without controls, its front by
    index, its cost by worker on CPUs too."""
    sweep = {"measure": "val_top1", **sweep}
    if "unit" in sweep:
        return sweep
    keys = {"gpu_hours": "cost", "naive_gpu_hours": "naive_cost"}
    now = {keys.get(key, key): value for key, value in sweep.items()}
    settings = [{keys.get(key, key): value for key, value in entry.items()} for entry in sweep["settings"]]
    full = {"trial": "trunk", "val_top1": sweep["full"]["val_top1"], "cost": sweep["full"]["gpu_hours"]}
    front = [settings[index]["trial"] for index in sweep["pareto"]]
    return {**now, "unit": "worker-hours", "full": full, "settings": settings, "controls": [], "pareto": front}


def differing_settings(runs: list[ReportedRun]) -> dict[str, list[Any]]:
    """Settings in which the runs differ, with each one's value; the name and where runs lie do not count."""
    contents = [comparable(run.settings) for run in runs]
    keys = [key for key in dict.fromkeys(itertools.chain(*contents)) if key not in ("name", "storage")]
    values = {key: [content.get(key) for content in contents] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}
