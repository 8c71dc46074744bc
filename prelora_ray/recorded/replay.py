"""The partial convergence test and the rank assignment over a recorded run, without training."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prelora_ray.config import MethodSettings, Settings
from prelora_ray.config_file import parse_method
from prelora_ray.engine.optim import rates_left
from prelora_ray.errors import UserError
from prelora_ray.method.convergence import Verdict
from prelora_ray.records import NormsLine
from prelora_ray.run_folder import RunFolder
from prelora_ray.schedule import decide, phase_schedule
from prelora_ray.words import counted

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
    note: str | None = None
    """What speaks against the verdict that it switches by; None where nothing does."""


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
    verdicts = decide(schedule, record.epochs)
    if schedule.switched_at is None:
        return Replay(None, None, None, _reason(method, len(record.epochs), verdicts), verdicts)
    window = verdicts[-1].window.index if verdicts else None
    left = record.rates_left[schedule.switched_at] if record.rates_left else None
    note = _what_speaks_against(method, verdicts)
    return Replay(window, schedule.switched_at, schedule.ranks, None, verdicts, left, note)


def _what_speaks_against(method: MethodSettings, verdicts: Sequence[Verdict]) -> str | None:
    """Why the test may be mistaken with the last of its verdicts, by which it switched; None where nothing says so.

    An update by AdamW lets a norm grow and weight decay lets it shrink. Where the two meet it stands still for a
    moment, and the weights move on (arXiv 2305.17212).
    """
    if method.switch_epoch is not None or not verdicts or not (verdicts[-1].growing and verdicts[-1].shrinking):
        return None
    return (
        f"the switch may be on a turning point: in the windows that it rests on, norms of {', '.join(verdicts[-1].growing)} "
        f"grow and norms of {', '.join(verdicts[-1].shrinking)} shrink; one that turns stands still for a moment alone"
    )


def why_no_switch(method: MethodSettings, verdicts: Sequence[Verdict], epochs: int) -> str:
    """What kept the test from a switch, and which thresholds would have brought one during a run of so many epochs.

    `verdicts`: of all windows so far, by a test that did not switch.
    """
    taken = [verdict for verdict in verdicts if verdict.largest is not None]
    if not taken:
        needed = f"{counted(method.windows, 'window')} of {counted(method.window_epochs, 'epoch')}"
        return (
            f"of {counted(len(verdicts), 'window')} none had a verdict, which takes {needed}, all but the first behind the ramp"
        )
    steps = taken[-1].steps
    change, family = max((change, name) for step in steps for name, change in step.family_change.items())
    loss_change = max(step.loss_change for step in steps)
    kept = []
    if change >= method.tau:
        kept.append(f"the norms of {family} changed by {change:.3g} %, where method.tau = {method.tau:g} wants less")
    if loss_change > method.zeta:
        kept.append(f"the loss changed by {loss_change:.3g} %, where method.zeta = {method.zeta:g} wants no more")
    others = _others(method, taken, epochs)
    instead = f"{' and '.join(others)}: try that, or" if others else "try"
    kept_it = " and ".join(kept)
    return f"in the last {counted(method.windows, 'window')} {kept_it}; {instead} more epochs, or method.switch_epoch"


def _others(method: MethodSettings, taken: Sequence[Verdict], epochs: int) -> list[str]:
    """Thresholds that would have brought a switch, each alone where that is enough, and both where neither is."""
    found = [verdict.largest for verdict in taken if verdict.largest and verdict.window.epoch_end < epochs]
    found = [largest for largest in found if all(map(math.isfinite, largest))]
    taus = [_above(change) for change, loss in found if loss <= method.zeta]
    zetas = [_above(loss) for change, loss in found if change < method.tau]
    pairs = [(min(taus), method.zeta)] if taus else []
    pairs += [(method.tau, min(zetas))] if zetas else []
    if not pairs and found:
        both = ((max(method.tau, _above(change)), max(method.zeta, _above(loss))) for change, loss in found)
        pairs = [min(both, key=lambda pair: pair[0] * pair[1])]
    told = []
    for tau, zeta in pairs:
        changed = {"tau": tau} if zeta == method.zeta else {"zeta": zeta} if tau == method.tau else {"tau": tau, "zeta": zeta}
        keys = " with ".join(f"method.{key} = {value:g}" for key, value in changed.items())
        end = next(verdict.window.epoch_end for verdict in taken if verdict.is_under(tau, zeta))
        told.append(f"{keys} would have switched after epoch {end}")
    return told


def _above(value: float) -> float:
    """The next larger number of two digits, from 0.0011 on: thresholds are read and written by people."""
    value = max(value, 1e-3)
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor(value / step + 1e-9) + 1) * step:.2g}")


def _reason(method: MethodSettings, num_epochs: int, verdicts: list[Verdict]) -> str:
    if method.switch_epoch is not None:
        return f"the record has {counted(num_epochs, 'epoch')} of phase full, fewer than switch_epoch = {method.switch_epoch}"
    if len(verdicts) < method.windows:
        return (
            f"the record has {counted(num_epochs, 'epoch')} of phase full, and {counted(method.windows, 'window')} of "
            f"{counted(method.window_epochs, 'epoch')} take {method.windows * method.window_epochs}"
        )
    told = why_no_switch(method, verdicts, num_epochs + 1)
    return f"no window in the record's {counted(num_epochs, 'epoch')} of phase full converged: {told}"
