"""One attempt of a run on one worker: what the loop calls."""

from __future__ import annotations

import contextlib
import functools
from typing import cast

import ray.train
import torch

from prelora_ray.config import Settings
from prelora_ray.data.batch import Batch
from prelora_ray.data.manifest import read_manifest
from prelora_ray.engine.agreement import agreed, from_rank_0
from prelora_ray.engine.micro_batch import FoundSizes
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.control import Action, Control
from prelora_ray.fault_tolerance.end import EndKind, remove_end
from prelora_ray.fault_tolerance.lock import CLAIM
from prelora_ray.fault_tolerance.notices import STOP_FILE, Notices, room_to_grow
from prelora_ray.fault_tolerance.ray_private import remove_unborn_actors
from prelora_ray.fault_tolerance.resume_point import resume_together
from prelora_ray.fault_tolerance.watchdog import OUTAGE_PATIENCE, Watchdog
from prelora_ray.measures import measures_of
from prelora_ray.method.phases import Decision, Phase
from prelora_ray.method.targets import target_norms
from prelora_ray.monitor.telemetry import WorkerTelemetry
from prelora_ray.records import EpochLine
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage, once_reachable
from prelora_ray.tasks.task import Evaluation
from prelora_ray.train.batch_stream import BatchStream, stream_plan, validates
from prelora_ray.train.epoch_meter import EpochMeter
from prelora_ray.train.found_sizes import read_found
from prelora_ray.train.initial_weights import initial_weights
from prelora_ray.train.recorder import RankZeroRecorder, Recorder
from prelora_ray.train.report import join_report, report_to_ray
from prelora_ray.train.saving import RankZeroSaving, Saving
from prelora_ray.words import counted

_CHECK_STEPS = 50
"""Steps between checks whether the loss is still finite, each of which waits for the device."""


class StoppedError(Exception):
    """The attempt ends here, and has committed a checkpoint."""


class WorkerAttempt:
    """One worker's part in one attempt. Every worker trains; rank 0 also decides, records and saves."""

    def __init__(self, settings: Settings, *, reports_epochs: bool) -> None:
        """`reports_epochs`: whether each epoch is reported to Ray Train, which every worker then waits for; else those
        that end a phase or the run are."""
        self._reports_epochs = reports_epochs
        self.watchdog = Watchdog(settings.workers.hang_seconds)
        self.settings = settings
        context = ray.train.get_context()
        self.rank, world_size = context.get_world_rank(), context.get_world_size()
        self.folder = once_reachable(
            lambda: _reached(RunFolder.of(settings)),
            settings.workers.hang_seconds * OUTAGE_PATIENCE,
            lambda: self.watchdog.beat(patiently=True),
        )
        checkpoints = Checkpoints(self.folder)
        device = ray.train.torch.get_device()
        if self.rank == 0:
            _clear(self.folder, checkpoints)
        point, checkpoint = resume_together(self.folder, checkpoints, self.rank, device)
        if self.rank == 0:
            self.folder.write_starting("build the model")
        manifest = read_manifest(Storage(settings.data.path))
        self.plan = stream_plan(settings, manifest, self.rank, world_size)
        batches = self.plan.orders["train"].num_batches
        source = settings.model.init_from if checkpoint is None and self.rank == 0 else None  # DDP hands on rank 0's weights
        initial = None if source is None else initial_weights(source)
        self.state = TrainState(settings, len(manifest.classes), batches, device, world_size, checkpoint, initial=initial)
        self._sums_before = _own_sums(checkpoint.state["sums"] if checkpoint else [], self.rank, world_size)
        self._train_step = TrainStep(self.state, self.plan)
        self._train_step.found_sizes = self._found_sizes()
        self._attempt = point.attempt
        self._measure = measures_of(settings.task)[0]
        self._doing: str | None = self._first_step()
        """What the next step takes longer for than others, as `records.Starting` names it."""
        self._control = Control()
        length = manifest.text.sequence_length if manifest.text is not None else None
        self._telemetry = WorkerTelemetry(settings, len(manifest.classes), self.rank, world_size, device, length)
        if self.rank == 0:
            self._recorder: Recorder = RankZeroRecorder(self.folder, settings, point, self.state, self.watchdog)
            for name in point.damaged:  # which an event tells
                with contextlib.suppress(OSError):  # where it stays, the next attempt finds it again
                    checkpoints.set_aside(name)
            uses_gpu = device.type == "cuda"
            has_room = functools.partial(room_to_grow, settings.workers, world_size, uses_gpu=uses_gpu)
            notices = Notices(self.folder, settings.checkpoint, has_room)
            self._saving: Saving = RankZeroSaving(checkpoints, settings, self.state, notices, self._recorder, self.watchdog)
            self.folder.write_starting(f"read the first {settings.sample}s")
        else:
            self._recorder = Recorder(self.folder, settings, self.rank, point.attempt, self.watchdog)
            self._saving = Saving()
        position, workers_on_node = (self.state.epoch, self.state.batch), context.get_local_world_size()
        self.stream = BatchStream(settings, self.plan, position, workers_on_node, self.watchdog.beat)

    def begin_epoch(self) -> None:
        if self.state.image_size != self.settings.image_size(self.state.epoch - 1):
            self.watchdog.beat(patiently=True)  # the first step of a size compiles
            if self.state.compiles:
                self._doing = f"compile for {counted(self.state.image_size, 'pixel')}"
        self._meter = EpochMeter(self.state, self.plan, self.stream, self._train_step.exchange_clock)
        self._telemetry.begin_epoch(self._meter.phase, self.state.image_size)
        self._recorder.epoch_begins()
        self._shows_images = self._recorder.wants_images(self.state.image_size)
        self._train_step.begin_epoch(self._sums_before)
        self._sums_before = (0.0, 0.0)

    def step(self, batch: Batch) -> None:
        """Trains on one batch, and then does what all workers have agreed to do.

        Raises StoppedError where that is to stop.
        """
        self._recorder.samples(batch)
        if self._shows_images:
            if (images := self._train_step.shown_images(batch)) is not None:
                self._recorder.images(images)
            self._shows_images = False
        if self._doing is not None:
            self._recorder.starts(self._doing)
            self._doing = None
        if self._train_step.wants_search:
            self._find_micro_batch(batch)
        self._train_step.train(batch)
        self.state.batch += 1
        exchanged = self._train_step.exchange_clock.seconds
        self._telemetry.step(batch.count, self._meter.wait_seconds, exchanged)
        if self.state.batch % _CHECK_STEPS == 0:
            self._train_step.check_finite()
        if self._recorder.progress_is_due():
            self._recorder.progress(self._train_step.local_loss(), self._meter.images_per_second())
            self._saving.record()
        self._act(self._control.exchange(self._saving.request()))

    def mean_loss(self) -> float:
        """Mean training loss over the epoch's images, of all workers."""
        self._recorder.flush_samples()
        self._train_step.check_finite()
        loss, count = self._train_step.epoch_sums()
        return self._meter.end_training(loss, count, count // self._train_step.task.counts_per_sample)

    def validate(self, epoch: int) -> list[Evaluation]:
        """Of the model, and of its averaged weights; none where the epoch is not validated."""
        if not validates(self.settings, epoch):
            return []
        return self._train_step.evaluate(self.stream.take("val", epoch))

    def decide(self, epoch: int, loss: float) -> Decision:
        """Rank 0 records the norms and decides what trains next; every worker gets the same decision."""
        decision = None
        if self.rank == 0:
            norms = target_norms(self.state.model, self.state.targets)
            self._recorder.norms(epoch, self._meter.phase, loss, norms)
            decision = self.state.phases.end_epoch(epoch, norms, loss)
            if decision.verdict is not None:
                self._recorder.window(self._meter.phase, decision.verdict)
        return agreed(self.state.phases, decision)

    def end_epoch(self, epoch: int, validations: list[Evaluation], decision: Decision) -> None:
        """Records and reports the epoch, moves on to the next phase, and saves."""
        line = self._meter.line(self._attempt, validations, self._train_step.learning_rate)
        self.state.epoch, self.state.batch = epoch + 1, 0
        if decision.begins_phase:
            self.watchdog.beat(patiently=True)  # what trains now is built and compiled anew
        self.state.apply(decision)
        if decision.begins_phase:
            self._doing = self._first_step()
        self._recorder.epoch(line, decision)
        is_last = epoch + 1 == self.settings.train.epochs
        must = is_last or decision.begins_phase or self._ends_trunk_window(epoch)
        if must:
            self.watchdog.beat(patiently=True)  # rank 0 may have to wait for an earlier save, and the others for rank 0
        if must or (epoch + 1) % self.settings.checkpoint.every_epochs == 0:
            value = getattr(line, self._measure.key)
            self._saving.save([], must=must, score=None if value is None else self._measure.score(value))
        if is_last:
            self._end_last_epoch()
        self._saving.record()
        self._recorder.flush_beside()
        if is_last or decision.begins_phase or self._reports_epochs:
            self._report(line, decision, is_last=is_last)

    def _report(self, line: EpochLine, decision: Decision, *, is_last: bool) -> None:
        if self.rank != 0:
            join_report()
            return
        has_all = is_last and self._saving.failure is None
        pointer = {"run": str(self.folder), "checkpoint": self._saving.newest()} if has_all else None
        report_to_ray(line, decision, self.state, pointer)

    def _end_last_epoch(self) -> None:
        self._telemetry.end()
        if self.rank != 0:
            self.watchdog.end()  # all that is left to do is rank 0's
            return
        self._saving.ensure_saved()
        self.watchdog.beat(patiently=True)

    def finish(self) -> None:
        """The run has trained all its epochs."""
        if self._saving.failure is None:
            self._end("finished")
        else:
            self._fail(f"the last epoch could not be saved, which the same command tries again: {self._saving.failure}")

    def fail(self, message: str) -> None:
        """Ends the run for good, without another try by Ray Train."""
        self._saving.ensure_saved()
        self._fail(message)

    def close(self) -> None:
        self.watchdog.end()
        self._saving.close()

    def _first_step(self) -> str:
        """What the first step of a phase, or of this attempt, does."""
        return "compile" if self.state.compiles else "take a first step"

    def _find_micro_batch(self, batch: Batch) -> None:
        self._saving.wait()  # or the snapshot that is being written would count twice
        self.watchdog.beat(patiently=True)
        self._train_step.search(batch)
        self._recorder.micro_batch(self._train_step.micro_batch, self._train_step.found_sizes)

    def _found_sizes(self) -> FoundSizes:
        """The micro-batches that the run found earlier, on a GPU of the same name."""
        if self.state.device.type != "cuda":
            return {}
        found = read_found(self.folder, torch.cuda.get_device_name(self.state.device)) if self.rank == 0 else None
        return cast(FoundSizes, from_rank_0(found))

    def _act(self, action: Action) -> None:
        """What rank 0 asked for, on every worker."""
        if action is Action.NONE:
            return
        self._train_step.check_finite()
        self._recorder.flush_samples()
        self._saving.save(self._train_step.worker_sums(), must=action is not Action.SAVE)
        if action is Action.SAVE:
            return
        self._saving.ensure_saved()
        kind: EndKind = "stop" if action is Action.STOP else "preemption"
        self._recorder.leaves(kind)
        with contextlib.suppress(OSError) if action is Action.STOP else contextlib.nullcontext():
            self._end(kind)
        raise StoppedError

    def _ends_trunk_window(self, epoch: int) -> bool:
        """Whether a fork may begin behind an epoch (from 0)."""
        is_trunk = self.settings.checkpoint.keep_trunk and self._meter.phase is Phase.FULL
        return is_trunk and (epoch + 1) % self.settings.method.window_epochs == 0

    def _fail(self, message: str) -> None:
        message = f"{message}; {self._last_good()}"
        self._recorder.failed(message)
        with contextlib.suppress(OSError):
            self._end("failed", message)

    def _last_good(self) -> str:
        try:
            newest = self._saving.newest()
        except OSError as error:
            return f"its checkpoints cannot be listed ({error})"
        return (
            f"the last good checkpoint is {self.folder / 'checkpoints' / newest}" if newest else "no checkpoint was saved yet"
        )

    def _end(self, kind: EndKind, message: str | None = None) -> None:
        """Where the last save has failed, the storage has been waited for already."""
        seconds = 0.0 if self._saving.failure is not None else self.settings.workers.hang_seconds
        self._recorder.attempt_ends(kind, seconds, message)


def _reached(folder: RunFolder) -> RunFolder:
    """The folder, once it answers."""
    folder.exists("config.yaml")
    return folder


def _clear(folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Removes what the attempt before has left that is of no more use. Rank 0's."""
    remove_unborn_actors()  # before any worker streams
    remove_end(folder)  # of an attempt in the same fit
    with contextlib.suppress(OSError):  # it only takes up room
        folder.remove_unfinished(but=(CLAIM, STOP_FILE))  # which the driver may be writing
        checkpoints.remove_unfinished()


def _own_sums(sums: list[list[float]], rank: int, world_size: int) -> tuple[float, float]:
    """This worker's share of the sums in a checkpoint: its own; with another number of workers, rank 0 has them all."""
    if len(sums) == world_size:
        return sums[rank][0], sums[rank][1]
    if rank != 0:
        return 0.0, 0.0
    return sum(entry[0] for entry in sums), sum(entry[1] for entry in sums)
