"""A run that begins where another one, its trunk, would leave phase full with its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prelora_ray.config import Settings, acts, flat
from prelora_ray.engine.snapshot import checkpoint_name
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import DriverLock
from prelora_ray.method.phases import Phase
from prelora_ray.records import EpochLine, Event, Fork, NormsLine, WindowLine
from prelora_ray.run_folder import RunFolder
from prelora_ray.schedule import decide, phase_schedule
from prelora_ray.sweep.replay import read_record

ATTEMPT = -1
"""Attempt of the lines that a fork takes over from its trunk: the run's own attempts count from 0."""


def fork(trunk: RunFolder, settings: Settings) -> int:
    """Makes a run folder at the point where a straight run with these settings leaves phase full; returns that epoch.

    `train` then goes on from there, to the same weights. Does nothing where the folder has been made
    before. The trunk is any run that kept its checkpoints (`checkpoint.keep_trunk`).

    Raises UserError where the trunk was run with other settings that act before the switch, never
    switches with these, or has no checkpoint at the switch; HeldRunError where another driver is making the folder.
    """
    _check_same_trunk(trunk, settings)
    record = read_record(str(trunk))
    schedule = phase_schedule(settings.method, settings.train.ramp_epochs, list(record.epochs[0].norms))
    verdicts = [decision.verdict for decision in decide(schedule, record.epochs) if decision.verdict is not None]
    epoch = schedule.switched_at
    if epoch is None:
        raise UserError(f"run {trunk} does not switch with the settings of {settings.name}: see `prelora replay`")
    folder = RunFolder.of(settings)
    name = checkpoint_name(epoch, 0)
    own = Checkpoints(folder)
    if own.names():
        return epoch
    kept = Checkpoints(trunk)
    if name not in kept.names():
        raise UserError(
            f"run {trunk} has no checkpoint of epoch {epoch}, where {settings.name} forks from it: "
            "train it with checkpoint.keep_trunk: true"
        )
    with DriverLock(folder):
        if own.names():  # made by another driver meanwhile
            return epoch
        before: dict[str, Any] = {"attempt": ATTEMPT, "phase": Phase.FULL.value}
        folder.write_records(NormsLine, [replace(line, attempt=ATTEMPT) for line in record.epochs if line.epoch < epoch])
        folder.write_records(EpochLine, [replace(line, attempt=ATTEMPT) for line in trunk.epochs() if line.epoch < epoch])
        folder.write_records(WindowLine, [WindowLine(**before, **verdict.record()) for verdict in verdicts])
        times = [event.time for event in trunk.events() if event.epoch < epoch]
        begin_and_end = [Fork(**before, time=time, epoch=epoch, trunk=str(trunk)) for time in (min(times), max(times))]
        folder.write_records(Event, begin_and_end)
        folder.write_json("data.json", trunk.read_json("data.json"))  # `train` then refuses other images
        checkpoint = kept.load(name)
        checkpoint.state |= {"phases": schedule.state_dict(), "fork": True}
        own.save(checkpoint)
    return epoch


def _check_same_trunk(trunk: RunFolder, settings: Settings) -> None:
    ours, theirs = flat(settings), flat(trunk.read_settings())
    now, before = _in_phase_full(ours), _in_phase_full(theirs)
    for key in ours | theirs:
        if acts(key) == "always" and now.get(key) != before.get(key):
            if key == "train.precision" and ours[key] == theirs[key]:
                key = "train.fp8_from"
            raise UserError(
                f"{key} = {ours.get(key)!r} is not allowed in a fork: its trunk {trunk} was run with {theirs.get(key)!r}"
            )


def _in_phase_full(keys: dict[str, Any]) -> dict[str, Any]:
    """What the keys come to there: fp8 is bf16, but where it is from phase full on."""
    is_later = keys["train.precision"] == "fp8" and keys["train.fp8_from"] != Phase.FULL
    return keys | ({"train.precision": "bf16"} if is_later else {}) | {"train.fp8_from": None}
