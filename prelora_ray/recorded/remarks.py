"""What is to be said of a run beside its numbers: how far it came, why it has not switched, whether it learns."""

from __future__ import annotations

from dataclasses import dataclass

from prelora_ray.fault_tolerance.end import read_end
from prelora_ray.recorded.replay import Record, Replay, replay, why_no_switch
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import Freeze, Switch
from prelora_ray.summaries import slowness
from prelora_ray.words import counted

_LITTLE = 3.0
"""A run has hardly learned where its top-1 is less than so many times what guessing comes to, ..."""
_LITTLE_SHARE = 0.15
"""... or the share that it has of the way from there to 1 is less than this."""


@dataclass(frozen=True)
class Remarks:
    progress: str
    """`finished`; or that it is not, how far it came, and what ended it."""
    is_finished: bool
    remarks: tuple[str, ...]
    """A sentence for each thing that keeps it from being what its recipe asks for."""
    so_far: tuple[str, ...] = ()
    """Of a run that goes on, or can: what stands against its next phase, and may pass."""


def remarks_on(run: RunRecords) -> Remarks:
    """Raises UserError where the folder holds no run."""
    remarks = [_not_frozen(run), _turning_point(run), _hardly_learned(run), _slow(run)]
    so_far = []
    if (why := _no_switch(run)) is not None:
        if run.is_finished:
            remarks.insert(0, f"no switch: {why}")
        else:
            so_far.append(f"no switch so far: {why}")
    progress = "finished" if run.is_finished else _unfinished(run)
    return Remarks(progress, run.is_finished, tuple(remark for remark in remarks if remark is not None), tuple(so_far))


def _unfinished(run: RunRecords) -> str:
    end = read_end(run.folder)
    after = f"after {run.completed} of {counted(run.settings.train.epochs, 'epoch')}"
    if end is None or end.end == "finished":
        return f"unfinished {after}"
    if end.end == "failed":
        return f"failed {after}: {end.message}"
    return f"{'stopped' if end.end == 'stop' else 'left nodes that were about to go'} {after}"


def _no_switch(run: RunRecords) -> str | None:
    """Why the test has not switched it; None where it has, or another rule than the test decides."""
    method = run.settings.method
    if not method.enabled or method.switch_epoch is not None or run.last_of(Switch) is not None:
        return None
    found = _replayed(run)
    if found is None or found.switch_epoch is not None:
        return None
    return why_no_switch(method, found.verdicts, run.settings.train.epochs)


def _turning_point(run: RunRecords) -> str | None:
    """Why the test may have switched it too early."""
    found = _replayed(run) if run.last_of(Switch) is not None else None
    return found.note if found is not None else None


def _replayed(run: RunRecords) -> Replay | None:
    """What its record leads to with its own settings; None where it has none from the first epoch on."""
    method, ramp_epochs = run.settings.method, run.settings.train.ramp_epochs
    lines = [line for index, line in enumerate(run.norms) if line.epoch == index]
    return replay(Record(lines, method, ramp_epochs), method, ramp_epochs) if lines else None


def _not_frozen(run: RunRecords) -> str | None:
    """None as long as it may come."""
    switch = run.last_of(Switch)
    if not run.is_finished or switch is None or run.last_of(Freeze) is not None:
        return None
    return (
        f"no freeze: the switch came after epoch {switch.switch_epoch} of {run.completed}, within "
        "method.warmup_epochs of the end; try an earlier one, less warmup, or more epochs"
    )


def _hardly_learned(run: RunRecords) -> str | None:
    """None also where that is not known, in the learning rate's ramp, and for a run that sees a few images alone."""
    last = next((line for line in reversed(run.epochs) if line.val_top1 is not None), None)
    if last is None or last.val_top1 is None or last.epoch < run.settings.train.ramp_epochs:
        return None
    if run.settings.data.max_batches is not None or run.num_classes is None:
        return None
    chance = 1 / run.num_classes
    if last.val_top1 >= min(_LITTLE * chance, chance + _LITTLE_SHARE * (1 - chance)):
        return None
    return (
        f"hardly learned: top-1 is {last.val_top1:.1%}, and guessing among {counted(run.num_classes, 'class', 'classes')} "
        f"comes to {chance:.1%}; try another train.learning_rate, a longer train.ramp_epochs, or weaker augment settings"
    )


def _slow(run: RunRecords) -> str | None:
    """Which worker holds up the others, and why, or that the network does."""
    found = slowness(run.epochs)
    if found is None:
        return None
    if found.worker is None:
        return (
            f"slow exchange of gradients: every worker waits for it {found.share:.0%} of the time and more; try "
            "train.gradient_exchange: bf16, larger batches, or a faster network"
        )
    what = "waiting for data" if found.cause == "data" else "computing"
    return (
        f"slow worker: worker {found.worker} holds up the others: it spends {found.share:.0%} of its time {what}, they "
        f"{found.others:.0%}, and they wait for it {found.wait:.0%} of theirs"
    )
