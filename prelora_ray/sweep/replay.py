"""The partial convergence test and the rank assignment over a recorded run, without training."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

from prelora_ray.config import MethodSettings, Settings
from prelora_ray.config_file import parse_method
from prelora_ray.engine.optim import rates_left
from prelora_ray.errors import UserError
from prelora_ray.method.convergence import Verdict
from prelora_ray.records import NormsLine
from prelora_ray.remarks import why_no_switch
from prelora_ray.run_folder import RunFolder
from prelora_ray.schedule import decide, phase_schedule

_OF_THE_TEST = {"tau", "zeta", "windows", "window_epochs", "norm_statistic"}
_OF_THE_RANKS = {"r_min", "r_max", "normalize", "rank_floor_percent"}


@dataclass(frozen=True)
class Record:
    """What a run recorded of its epochs in phase full, and what it was run with where that is known."""

    epochs: list[NormsLine]
    """Lines of norms.jsonl that stand, in order."""
    method: MethodSettings
    ramp_epochs: int
    rates_left: list[float] | None = None
    """Share of the learning rate's sum that is left after 0, 1, ... epochs; None where the settings are not known."""


@dataclass(frozen=True)
class Replay:
    switch_window: int | None
    switch_epoch: int | None
    ranks: dict[str, int] | None
    reason: str | None
    """Why there is no switch; None where there is one."""
    verdicts: list[Verdict]
    rate_left: float | None = None
    """Share of the learning rate's sum that is left at the switch; None without one, or where it is not known."""


def read_record(source: str) -> Record:
    """Reads a run folder or a norms.jsonl; settings come from the config.yaml beside it, or are the defaults.

    Raises UserError where there is no record, or it is damaged.
    """
    path, name = posixpath.split(source) if source.endswith(".jsonl") else (source, "norms.jsonl")
    folder = RunFolder(path or ".")
    if not folder.exists(name):
        raise UserError(f"{source!r} is no record: give a run folder with a norms.jsonl, or such a file itself")
    epochs = [line for line in folder.norms(name) if line.phase == "full"]
    if not epochs:
        raise UserError(f"{source!r} has no epoch of phase full")
    for line in epochs:
        norms = list(line.norms.values()) if isinstance(line.norms, dict) else []
        if not norms or not all(isinstance(number, (int, float)) for number in (line.loss, *norms)):
            raise UserError(f"{source!r} is no record of norms: epoch {line.epoch} lacks a loss, or norms by module name")
    expected = [(i, set(epochs[0].norms)) for i in range(len(epochs))]
    found = [(line.epoch, set(line.norms)) for line in epochs]
    if found != expected:
        epoch = next(i for i, pair in enumerate(expected) if pair != found[i])
        raise UserError(f"{source!r} is not whole: the record of epoch {epoch} is missing or has other modules")
    settings: Settings | None = folder.read_settings() if folder.exists("config.yaml") else None
    if settings is None:
        return Record(epochs, MethodSettings(), ramp_epochs=0)
    return Record(epochs, settings.method, settings.train.ramp_epochs, rates_left(settings))


def changed_method(record: Record, changes: dict[str, Any]) -> MethodSettings:
    """The settings of the method that a record was made with, with others for some keys.

    With another test the run's forced switch does not stand, with other ranks its pattern of them. Raises UserError for
    what is not allowed.
    """
    given = dict(changes)
    if changes.keys() & _OF_THE_TEST:
        given.setdefault("switch_epoch", None)
    if changes.keys() & _OF_THE_RANKS:
        given.setdefault("rank_pattern", None)
    return parse_method({**record.method.model_dump(), **given})


def replay(record: Record, method: MethodSettings, ramp_epochs: int) -> Replay:
    """Where `method` would have switched the recorded run, and with which ranks."""
    schedule = phase_schedule(method.model_copy(update={"enabled": True}), ramp_epochs, list(record.epochs[0].norms))
    verdicts = [decision.verdict for decision in decide(schedule, record.epochs) if decision.verdict is not None]
    if schedule.switched_at is None:
        return Replay(None, None, None, _reason(method, len(record.epochs), verdicts), verdicts)
    window = verdicts[-1].window.index if verdicts else None
    left = record.rates_left[schedule.switched_at] if record.rates_left else None
    return Replay(window, schedule.switched_at, schedule.ranks, None, verdicts, left)


def _reason(method: MethodSettings, num_epochs: int, verdicts: list[Verdict]) -> str:
    if method.switch_epoch is not None:
        return f"the record has {num_epochs} epochs of phase full, fewer than switch_epoch = {method.switch_epoch}"
    if len(verdicts) < method.windows:
        return (
            f"the record has {num_epochs} epochs of phase full, and {method.windows} windows of "
            f"{method.window_epochs} epochs take {method.windows * method.window_epochs}"
        )
    told = why_no_switch(method, verdicts, num_epochs + 1)
    return f"no window in the record's {num_epochs} epochs of phase full converged: {told}"
