"""A run that begins where another one, its trunk, would leave phase full with its settings, or end sooner with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prelora_ray.config import Settings, acts, comparable, settled_alike
from prelora_ray.engine.snapshot import checkpoint_name
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import DriverLock
from prelora_ray.method.phases import Phase
from prelora_ray.recorded.replay import Record, read_record
from prelora_ray.records import EpochLine, Event, Fork, NormsLine, WindowLine
from prelora_ray.run_folder import RunFolder
from prelora_ray.schedule import decide, phase_schedule
from prelora_ray.words import counted

ATTEMPT = -1
"""Attempt of the lines that a fork takes over from its trunk: the run's own attempts count from 0."""


def fork(trunk: RunFolder, settings: Settings) -> int:
    """Makes a run folder at the point where a straight run with these settings leaves phase full; returns that epoch.

    One that never does (`method.enabled: false`) is full training that ends sooner: it begins where its schedule is
    bent, after `train.bend.after` epochs. `train` then goes on from there, to the same weights. Does nothing where the
    folder has been made before. The trunk is any run that kept its checkpoints (`checkpoint.keep_trunk`).

    Raises UserError where the trunk was run with other settings that act before the fork, never
    switches with these, or has no checkpoint there; HeldRunError where another driver is making the folder.
    """
    of_trunk = trunk.read_settings()
    settings = settled_alike(settings, of_trunk)
    _check_same_trunk(trunk, of_trunk, settings)
    record = read_record(str(trunk))
    schedule = phase_schedule(settings.method, settings.train.ramp_epochs, list(record.epochs[0].norms))
    end = None if settings.method.enabled else _bend_of_full_training(trunk, settings, record)
    verdicts = decide(schedule, record.epochs[:end])
    epoch = schedule.switched_at if settings.method.enabled else end
    if epoch is None:
        raise UserError(f"run {trunk} does not switch with the settings of {settings.name}: see `prelora replay`")
    _check_bend(trunk, of_trunk, settings, epoch)
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
        folder.write_settings(settings)  # and goes on with what the trunk settled
        checkpoint = kept.load(name)
        checkpoint.state |= {"phases": schedule.state_dict(), "fork": schedule.phase is not Phase.FULL}
        own.save(checkpoint)
    return epoch


def _bend_of_full_training(trunk: RunFolder, settings: Settings, record: Record) -> int:
    bend, num_epochs = settings.train.bend, len(record.epochs)
    if bend is None:
        raise UserError("method.enabled = False is not allowed in a fork without train.bend: it would be its trunk again")
    if num_epochs < bend.after:
        raise UserError(
            f"train.bend.after = {bend.after} is not allowed in a fork: its trunk {trunk} has "
            f"{counted(num_epochs, 'epoch')} of phase full"
        )
    return bend.after


def _check_bend(trunk: RunFolder, of_trunk: Settings, settings: Settings, epoch: int) -> None:
    """Raises UserError where a fork that begins after so many epochs has a bend before that, and its trunk none."""
    bend = settings.train.bend
    if bend is not None and bend.after < epoch and of_trunk.train.bend is None:
        raise UserError(
            f"train.bend.after = {bend.after} is not allowed in a fork of {trunk}: it must be at least {epoch}, where it begins"
        )


def _check_same_trunk(trunk: RunFolder, of_trunk: Settings, settings: Settings) -> None:
    ours, theirs = comparable(_in_front_of_bend(trunk, settings, of_trunk)), comparable(of_trunk)
    now, before = _in_phase_full(ours), _in_phase_full(theirs)
    for key in ours | theirs:
        if acts(key) == "always" and now.get(key) != before.get(key):
            if key == "train.precision" and ours[key] == theirs[key]:
                key = "train.fp8_from"
            told = f"{key} = {ours.get(key)!r} is not allowed in a fork: its trunk {trunk} was run with {theirs.get(key)!r}"
            if key == "train.epochs" and ours[key] < theirs[key]:
                told += f"; it ends sooner with train.bend: {{after: EPOCH, of: {theirs[key]}}}"
            raise UserError(told)


def _in_front_of_bend(trunk: RunFolder, settings: Settings, of_trunk: Settings) -> Settings:
    """The settings that the run has up to a bend that its trunk lacks."""
    bend, epochs = settings.train.bend, of_trunk.train.epochs
    if bend is None or of_trunk.train.bend is not None:
        return settings
    if bend.of != epochs:
        raise UserError(
            f"train.bend.of = {bend.of} is not allowed in a fork: its trunk {trunk} was run with train.epochs = {epochs}"
        )
    return settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": epochs, "bend": None})})


def _in_phase_full(keys: dict[str, Any]) -> dict[str, Any]:
    """What the keys come to there: fp8 is bf16, but where it is from phase full on."""
    is_later = keys["train.precision"] == "fp8" and keys["train.fp8_from"] != Phase.FULL
    return keys | ({"train.precision": "bf16"} if is_later else {}) | {"train.fp8_from": None}
