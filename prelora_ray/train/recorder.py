"""What an attempt records in the run folder, and for loggers and Prometheus."""

from __future__ import annotations

import contextlib
import functools
import platform
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from prelora_ray.config import Settings
from prelora_ray.data.batch import Batch
from prelora_ray.engine.micro_batch import FoundSizes
from prelora_ray.engine.optim import rates_left
from prelora_ray.engine.state import TrainState
from prelora_ray.fault_tolerance.async_checkpointer import Saved
from prelora_ray.fault_tolerance.background import Background
from prelora_ray.fault_tolerance.end import End, EndKind, write_end
from prelora_ray.fault_tolerance.ray_private import reservation
from prelora_ray.fault_tolerance.resume_point import ResumePoint
from prelora_ray.fault_tolerance.watchdog import Watchdog
from prelora_ray.method.convergence import Verdict
from prelora_ray.method.diagnosis import diagnose
from prelora_ray.method.phases import Decision, Phase, count_parameters
from prelora_ray.method.ranks import rank_choices
from prelora_ray.monitor.loggers import Loggers
from prelora_ray.monitor.scalars import Pixels
from prelora_ray.monitor.telemetry import RunTelemetry
from prelora_ray.records import (
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    Diagnosis,
    EpochLine,
    Event,
    Freeze,
    InitFrom,
    MicroBatch,
    NormsLine,
    Preemption,
    Progress,
    Resize,
    Restart,
    RunFailed,
    RunStarted,
    Stop,
    Switch,
    WindowClosed,
    WindowLine,
)
from prelora_ray.run_folder import LineWriter, RecordWriter, RunFolder
from prelora_ray.summaries import remaining_seconds
from prelora_ray.train.found_sizes import write_found

_SAMPLES_SECONDS = 2.0
_LAST_FLUSHES = 10
"""How often the end of an attempt tries to write its records, where a try takes no time."""


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


class Recorder:
    """Of a worker other than rank 0: with `audit_samples` it records its samples, and nothing else."""

    def __init__(self, folder: RunFolder, settings: Settings, rank: int, attempt: int, watchdog: Watchdog) -> None:
        self._folder = folder
        self._settings = settings
        self._attempt = attempt
        self._watchdog = watchdog
        self._audit = LineWriter(folder, f"samples-{rank}.jsonl") if settings.audit_samples else None
        self._flushing = Background()
        self._flush_lock = threading.Lock()
        """A flush may also be the checkpointer's, which has the records written before a checkpoint."""

    def progress_is_due(self) -> bool:
        """Whether `progress` is due again; once it says so, not again for a while."""
        return False

    def samples(self, batch: Batch) -> None:
        if self._audit:
            ids = [int(i) for i in batch.ids if i >= 0]
            self._audit.write(attempt=self._attempt, epoch=batch.epoch, batch=batch.batch, samples=ids)

    def wants_images(self, image_size: int) -> bool:
        """Whether `images` of this size are to be shown."""
        return False

    def images(self, images: Pixels) -> None:
        """Some of the images that are about to be trained on, as the model takes them."""

    def epoch_begins(self) -> None:
        """An epoch, or the rest of one, is about to be trained."""

    def starts(self, doing: str) -> None:
        """A step that takes longer than others is about to be trained, as it does what `records.Starting` names."""

    def progress(self, loss: float, images_per_second: float) -> None:
        """Where the run is. `loss`: of this worker's images since the epoch's begin."""

    def micro_batch(self, size: int, found: FoundSizes) -> None:
        """The largest micro-batch of the phase and size of images has been found."""

    def saved(self, results: Iterable[Saved]) -> None:
        """What became of saves."""

    def norms(self, epoch: int, phase: Phase, loss: float, norms: dict[str, float]) -> None:
        """What the test sees of an epoch."""

    def window(self, phase: Phase, verdict: Verdict) -> None:
        """A window has ended."""

    def epoch(self, line: EpochLine, decision: Decision) -> None:
        """An epoch has ended, and the decision behind it is applied."""

    def leaves(self, kind: EndKind) -> None:
        """The attempt is about to end because it was asked to."""

    def failed(self, message: str) -> None:
        """The run fails for good."""

    def flush(self) -> None:
        """Has the run folder hold all that was recorded. Raises OSError where it cannot."""
        with self._flush_lock:
            if not self._flush():
                raise OSError(f"no room for the records in {self._folder}, or it cannot be reached")

    def flush_beside(self) -> None:
        """Flushes as soon as it can, beside the loop. What an earlier flush holds up waits for the next."""

        def work() -> None:
            with contextlib.suppress(OSError):  # the next flush tries again
                self.flush()

        if not self._flushing.is_busy:
            self._flushing.begin(work)

    def flush_samples(self) -> None:
        """Flushes before a checkpoint, from which a later attempt goes on without these samples.

        No step waits long for that: while the storage does not answer, they are lost if this worker dies.
        """
        if self._audit:
            self._flushing.wait(_SAMPLES_SECONDS, self._watchdog.beat)  # for one that began before the last samples
            self.flush_beside()
            self._flushing.wait(_SAMPLES_SECONDS, self._watchdog.beat)

    def attempt_ends(self, kind: EndKind, seconds: float, message: str | None = None) -> None:
        """Tries for so many seconds to have the run folder hold all that was recorded."""
        with contextlib.suppress(OSError):  # samples are no reason to train again
            self._finish_flushing(seconds)

    def _finish_flushing(self, seconds: float, then: Callable[[], None] = lambda: None) -> None:
        """Returns once the run folder holds all that was recorded, and `then` has worked after that."""
        end = time.monotonic() + seconds
        self._flushing.wait(meanwhile=self._watchdog.beat)
        while (failure := self._try_to_finish(then)) is not None:
            if not isinstance(failure, OSError) or time.monotonic() > end:
                raise failure
            self._watchdog.beat()
            time.sleep(self._settings.workers.hang_seconds / _LAST_FLUSHES)

    def _try_to_finish(self, then: Callable[[], None]) -> Exception | None:
        """Why it failed; None where it has not."""
        failures: list[Exception] = []

        def work() -> None:
            try:
                self.flush()
                then()
            except Exception as failure:
                failures.append(failure)

        self._flushing.begin(work)
        self._flushing.wait(meanwhile=self._watchdog.beat)
        return failures[0] if failures else None

    def _flush(self) -> bool:
        """Returns whether the run folder holds all that was recorded."""
        return self._audit is None or self._audit.flush()


class RankZeroRecorder(Recorder):
    """Of rank 0: all records of the run."""

    def __init__(
        self, folder: RunFolder, settings: Settings, point: ResumePoint, state: TrainState, watchdog: Watchdog
    ) -> None:
        super().__init__(folder, settings, 0, point.attempt, watchdog)
        self._state = state
        self._records = RecordWriter(folder)
        self._telling = Background()
        self._wrote_ranks = False
        self._found_sizes: FoundSizes = {}
        self._begin(point)
        self._loggers = Loggers(folder, settings, point.attempt, state.epoch)
        self._epochs = [line for line in folder.epochs() if line.epoch < state.epoch]
        events = folder.events()
        self._diagnosed = {event.signature for event in events if isinstance(event, Diagnosis)}
        self._telemetry = RunTelemetry(settings, state.world_size, events)

    def _begin(self, point: ResumePoint) -> None:
        for message in point.damaged.values():
            self._event(CheckpointDamaged, message=message)
        world_size = self._state.world_size
        device = _name_of(self._state.device)
        content: dict[str, Any] = {"world_size": world_size, "reservation": reservation(), "device": device}
        if point.attempt == 0:
            self._event(RunStarted, seed=self._settings.train.seed, **content)
        else:
            lost = max(0, point.last_step - self._state.step)
            self._event(Restart, cause=point.cause, seconds=point.seconds, steps_again=lost, **content)
            if point.world_size != world_size:
                self._event(Resize, world_size=world_size, before=point.world_size)
        for sentence in self._state.pretrained_notes:
            self._event(InitFrom, message=sentence)
        if self._state.fork is not None:
            self._change(self._state.fork)
        self._write_ranks()
        self._records.flush_events()

    def progress_is_due(self) -> bool:
        return self._records.progress_is_due()

    def wants_images(self, image_size: int) -> bool:
        return self._loggers.wants_samples(image_size)

    def images(self, images: Pixels) -> None:
        self._loggers.samples(self._state.epoch, images)

    def epoch_begins(self) -> None:
        phases = self._state.phases
        self._telemetry.state(phases.phase, self._state.epoch, phases.ranks)

    def starts(self, doing: str) -> None:
        if not self._telling.is_busy:
            self._telling.begin(functools.partial(self._folder.write_starting, doing))

    def progress(self, loss: float, images_per_second: float) -> None:
        state = self._state
        now = Progress(
            attempt=self._attempt,
            time=time.time(),
            epoch=state.epoch,
            batch=state.batch,
            batches=state.batches,
            step=state.step,
            phase=state.phases.phase.value,
            loss=loss,
            images_per_second=images_per_second,
        )
        if not self._telling.is_busy:
            self._telling.begin(functools.partial(self._records.progress, now))
        self._telemetry.progress(loss)

    def micro_batch(self, size: int, found: FoundSizes) -> None:
        self._event(MicroBatch, micro_batch=size, image_size=self._state.image_size)
        self._found_sizes = dict(found)
        self.flush_beside()

    def saved(self, results: Iterable[Saved]) -> None:
        for saved in results:
            if saved.error is None:
                self._telemetry.saved(saved.seconds)
                self._event(CheckpointSaved, checkpoint=saved.name, seconds=saved.seconds)
            else:
                self._event(CheckpointFailed, checkpoint=saved.name, seconds=saved.seconds, message=saved.error)

    def norms(self, epoch: int, phase: Phase, loss: float, norms: dict[str, float]) -> None:
        self._records.write(NormsLine(attempt=self._attempt, epoch=epoch, phase=phase.value, loss=loss, norms=norms))

    def window(self, phase: Phase, verdict: Verdict) -> None:
        line = WindowLine(attempt=self._attempt, phase=phase.value, **verdict.record())
        self._records.write(line)
        self._loggers.window(line)
        self._telemetry.window(line)
        self._event(WindowClosed, window=line.window, converged=line.converged, in_ramp=line.in_ramp)

    def epoch(self, line: EpochLine, decision: Decision) -> None:
        self._records.write(line)
        self._loggers.epoch(line)
        self._epochs.append(line)
        self._telemetry.epoch(line, remaining_seconds(self._epochs, self._settings.train.epochs - line.epoch - 1))
        self._change(decision)
        self._diagnose()

    def leaves(self, kind: EndKind) -> None:
        self._event(Stop if kind == "stop" else Preemption)

    def failed(self, message: str) -> None:
        self._event(RunFailed, message=message)

    def attempt_ends(self, kind: EndKind, seconds: float, message: str | None = None) -> None:
        """Also records then how the attempt ended.

        Raises OSError where that fails: so has the attempt. Where no other one follows, the driver reports that the
        record is missing.
        """
        end = End(kind, self._state.epoch, self._state.step, message)
        self._finish_flushing(seconds, lambda: write_end(self._folder, end))
        self._loggers.end(kind, self._watchdog.beat)

    def _change(self, decision: Decision) -> None:
        if not decision.begins_phase:
            return
        phases = self._state.phases
        trainable, parameters = count_parameters(self._state.model)
        content: dict[str, Any] = {
            "trainable_parameters": trainable,
            "parameters": parameters,
            "format": self._state.format,
            "logit_change": self._state.logit_change,
        }
        if decision.switch is not None:
            left = rates_left(self._settings)[self._state.epoch]
            self._event(Switch, switch_epoch=phases.switched_at, rate_left=left, **content)
        if decision.freeze:
            self._event(Freeze, freeze_epoch=phases.frozen_at, **content)

    def _diagnose(self) -> None:
        """Records failure signatures, each once."""
        method = self._settings.method
        for finding in diagnose(self._epochs, self._state.phases.ranks, len(rank_choices(method.r_min, method.r_max))):
            if finding.signature not in self._diagnosed:
                self._diagnosed.add(finding.signature)
                self._event(Diagnosis, **asdict(finding))
                self._telemetry.diagnosis(finding.signature)

    def _event(self, kind: type[Event], **content: Any) -> None:
        state = self._state
        place = {"epoch": state.epoch, "step": state.step, "phase": state.phases.phase.value}
        self._records.write(kind(**{"attempt": self._attempt, "time": time.time(), **place, **content}))

    def _flush(self) -> bool:
        found, self._found_sizes = self._found_sizes, {}
        if found:
            write_found(self._folder, torch.cuda.get_device_name(self._state.device), found)
        flushes = [super()._flush, self._write_ranks, self._records.flush, self._loggers.flush]
        return all(flush() for flush in flushes)  # where one fails, the others would too

    def _write_ranks(self) -> bool:
        """Writes ranks.json once an attempt, from what checkpoints hold too; returns whether it is there, if due."""
        ranks = self._state.phases.ranks
        if ranks is not None and not self._wrote_ranks:
            with contextlib.suppress(OSError):
                self._folder.write_json("ranks.json", ranks)
                self._wrote_ranks = True
        return ranks is None or self._wrote_ranks
