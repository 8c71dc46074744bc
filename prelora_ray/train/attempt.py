"""What the loop calls: one attempt of a run on one worker, its records and its checkpoints."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import ray.train
import torch
import torch.distributed as dist

from prelora_ray.config import Settings
from prelora_ray.data.batch import Batch
from prelora_ray.data.manifest import read_manifest
from prelora_ray.engine.evaluation import Evaluation
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import Stepper
from prelora_ray.fault_tolerance.background import Background
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, Retention
from prelora_ray.fault_tolerance.control import Action, Control
from prelora_ray.fault_tolerance.end import End, EndKind, remove_end, write_end
from prelora_ray.fault_tolerance.lock import CLAIM
from prelora_ray.fault_tolerance.notices import STOP_FILE, Notices, room_to_grow
from prelora_ray.fault_tolerance.ray_private import remove_unborn_actors, reservation
from prelora_ray.fault_tolerance.resume_point import Start, find_start
from prelora_ray.fault_tolerance.saver import Saver
from prelora_ray.fault_tolerance.watchdog import OUTAGE_PATIENCE, Watchdog
from prelora_ray.method.diagnosis import diagnose
from prelora_ray.method.phases import Decision, Phase, count_parameters
from prelora_ray.method.ranks import rank_choices
from prelora_ray.method.targets import target_norms
from prelora_ray.monitor.telemetry import RunTelemetry, WorkerTelemetry
from prelora_ray.monitor.tensorboard import TensorBoardLog
from prelora_ray.run_folder import LineWriter, RunFolder, RunRecords, last_attempt
from prelora_ray.storage import Storage, once_reachable
from prelora_ray.train.feed import Feed, stream_plan, validates
from prelora_ray.train.found_sizes import read_found, write_found
from prelora_ray.train.report import report

_CHECK_STEPS = 50
"""Steps between looks whether the loss is still finite, each of which waits for the device."""
_LAST_SAVES = 10
"""How often the end of a run tries to save, where a try takes no time."""


class StoppedError(Exception):
    """The run stops here for now, and has committed where it stands."""


class Session:
    """One worker's part in one attempt. Every worker trains; rank 0 also decides, records and saves."""

    def __init__(self, settings: Settings) -> None:
        self.watchdog = Watchdog(settings.workers.hang_seconds)
        self.settings = settings
        context = ray.train.get_context()
        self.rank, world_size = context.get_world_rank(), context.get_world_size()
        self.folder = once_reachable(
            lambda: _reached(RunFolder.of(settings)),
            settings.workers.hang_seconds * OUTAGE_PATIENCE,
            lambda: self.watchdog.beat(patiently=True),
        )
        self.checkpoints = Checkpoints(self.folder)
        if self.rank == 0:
            remove_unborn_actors()  # before any worker streams
            remove_end(self.folder)  # the one of an attempt before, in the same fit
            with contextlib.suppress(OSError):  # it only takes up room
                self.folder.remove_unfinished(but=(CLAIM, STOP_FILE))  # which the driver may be writing
                self.checkpoints.remove_unfinished()
        start, checkpoint = find_start(self.folder, self.checkpoints) if self.rank == 0 else (None, None)
        start = cast(Start, _from_rank_0(start))
        if self.rank != 0 and start.checkpoint is not None:
            checkpoint = self.checkpoints.load(start.checkpoint)
        self.attempt = start.attempt
        manifest = read_manifest(Storage(settings.data.path))
        self.plan = stream_plan(settings, manifest, self.rank, world_size)
        device = ray.train.torch.get_device()
        batches = self.plan.orders["train"].num_batches
        self.state = TrainState(settings, len(manifest.classes), batches, device, world_size, checkpoint)
        self.stepper = Stepper(self.state, self.plan)
        self.stepper.found_sizes = self._found_sizes()
        self._sums_before = _own_sums(checkpoint.state["sums"] if checkpoint else [], self.rank, world_size)
        self.control = Control()
        self._telling, self._flushing = Background(), Background()
        self.records = RunRecords(self.folder, self.attempt) if self.rank == 0 else None
        self.audit = LineWriter(self.folder, f"samples-{self.rank}.jsonl") if settings.audit_samples else None
        self.telemetry = WorkerTelemetry(settings, len(manifest.classes), self.rank, world_size, device)
        if self.records:
            trunk_epochs = settings.method.window_epochs if settings.checkpoint.keep_trunk else None
            self.saver = Saver(self.checkpoints, Retention(settings.checkpoint.keep, trunk_epochs))
            uses_gpu = device.type == "cuda"
            has_room = functools.partial(room_to_grow, settings.workers, world_size, uses_gpu=uses_gpu)
            self.notices = Notices(self.folder, settings.checkpoint, has_room)
            self._wrote_ranks = False
            self.board = TensorBoardLog(self.folder, self.attempt, self.state.epoch)
            self._record_start(start)
            done = last_attempt(self.folder.read_lines("epochs.jsonl"), "epoch")
            self._lines = [line for line in done if line["epoch"] < self.state.epoch]
            events = self.folder.read_lines("events.jsonl")
            self._diagnosed = {line["signature"] for line in events if line["event"] == "diagnosis"}
            self.run_telemetry = RunTelemetry(settings, world_size, events)
        self.feed = Feed(
            settings, self.plan, (self.state.epoch, self.state.batch), context.get_local_world_size(), self.watchdog.beat
        )

    def begin_epoch(self) -> None:
        self._epoch_time = time.monotonic()
        self._phase = self.state.phases.phase
        self.feed.wait_seconds = 0.0
        self.telemetry.begin_epoch(self._phase)
        if self.records:
            self.run_telemetry.state(self._phase, self.state.epoch, self.state.phases.ranks)
        self.stepper.begin_epoch(self._sums_before)
        self._sums_before = (0.0, 0.0)
        self._first_batch = self.state.batch

    def step(self, batch: Batch) -> None:
        """Trains on one batch, and then does what all workers have agreed to do.

        Raises StoppedError where that is to stop.
        """
        if self.audit:
            ids = [int(i) for i in batch.ids if i >= 0]
            self.audit.write(attempt=self.attempt, epoch=batch.epoch, batch=batch.batch, samples=ids)
        if self.stepper.wants_search:
            self._find_micro_batch(batch)
        self.stepper.train(batch)
        self.state.batch += 1
        self.telemetry.step(int((batch.labels >= 0).sum()), self.feed.wait_seconds)
        if self.state.batch % _CHECK_STEPS == 0:
            self.stepper.check_finite()
        if self.records and self.records.progress_is_due():
            seconds = time.monotonic() - self._epoch_time
            images = (self.state.batch - self._first_batch) * self.settings.data.batch_size
            loss = self.stepper.local_loss()
            self._progress(loss=loss, images_per_second=images / seconds)
            self.run_telemetry.progress(loss)
            self._record_saves()
        wish = self.notices.wish(self.state.step, is_busy=self.saver.is_busy) if self.records else Action.NONE
        self._act(self.control.exchange(wish))

    def mean_loss(self) -> float:
        """Mean training loss over the epoch's images, of all workers."""
        self.stepper.check_finite()
        loss, self._images = self.stepper.epoch_sums()
        self._images_here = self.plan.orders["train"].rows_from(self._first_batch)
        self._train_seconds = time.monotonic() - self._epoch_time
        self._wait_seconds = self.feed.wait_seconds
        return loss / self._images

    def validate(self, epoch: int) -> Evaluation | None:
        if not validates(self.settings, epoch):
            return None
        validation = self.stepper.evaluate(self.feed.take("val", epoch))
        self.state.best_val_top1 = max(self.state.best_val_top1, validation.top1)
        return validation

    def decide(self, epoch: int, loss: float) -> Decision:
        """Rank 0 records the norms and decides what trains next; every worker gets the same decision."""
        content = None
        if self.rank == 0:
            norms = target_norms(self.state.model, self.state.targets)
            assert self.records
            self.records.norms(epoch=epoch, phase=self._phase, loss=loss, norms=norms)
            decision = self.state.phases.end_epoch(epoch, norms, loss)
            if decision.verdict is not None:
                line = decision.verdict.record()
                self.records.window(phase=self._phase, **line)
                self.board.window(line)
                self.run_telemetry.window(line)
                self._event("window", **{k: line[k] for k in ("window", "converged", "in_ramp")})
            content = {"decision": decision, "phases": self.state.phases.state_dict()}
        content = _from_rank_0(content)
        self.state.phases.load_state_dict(content["phases"])
        return cast(Decision, content["decision"])

    def end_epoch(self, epoch: int, loss: float, validation: Evaluation | None, decision: Decision) -> None:
        """Records and reports the epoch, moves on to the next phase, and saves."""
        trainable, parameters = count_parameters(self.state.model)
        line: dict[str, Any] = {
            "epoch": epoch,
            "phase": self._phase.value,
            "loss": loss,
            "val_loss": validation and validation.loss,
            "val_top1": validation and validation.top1,
            "val_top5": validation and validation.top5,
            "images_per_second": self._images_here / self._train_seconds,
            "images": self._images,
            "train_seconds": self._train_seconds,
            "seconds": time.monotonic() - self._epoch_time,
            "data_wait_seconds": self._wait_seconds,
            "peak_memory_bytes": _peak_memory_bytes(self.state.device),
            "trainable_parameters": trainable,
            "parameters": parameters,
            "gradient_bytes": trainable * self.state.dtype.itemsize if self.state.world_size > 1 else 0,
            "learning_rate": self.stepper.learning_rate,
            "world_size": self.state.world_size,
        }
        self.state.epoch, self.state.batch = epoch + 1, 0
        if decision.switch is not None or decision.freeze:
            self.watchdog.beat(patiently=True)  # what trains now is built and compiled anew
        self.state.apply(decision)
        if self.records:
            self.records.epoch(**line)
            self.board.epoch(line)
            self.run_telemetry.epoch(line)
            self._record_change(decision)
            self._diagnose(line)
        is_last = epoch + 1 == self.settings.train.epochs
        must = is_last or decision.switch is not None or decision.freeze or self._ends_trunk_window(epoch)
        if must:
            self.watchdog.beat(patiently=True)  # rank 0 may have to wait for an earlier save, and the others for rank 0
        if self.records and (must or (epoch + 1) % self.settings.checkpoint.every_epochs == 0):
            patience = self.settings.workers.hang_seconds / 2 if self.saver.failure is None else 0.0
            self._save([], math.inf if must else patience, val_top1=line["val_top1"])
        if is_last and self.records:
            self._finish_saving()
            self.watchdog.beat(patiently=True)
        elif is_last:
            self.watchdog.end()  # all that is left to do is rank 0's
        if self.records:
            self._record_saves()
        self._flush_beside()
        if is_last:
            self.telemetry.send()
        report(self, line, decision)

    def finish(self) -> None:
        """The run has trained all its epochs."""
        if not self.records:
            self._finish_audit()
        elif self.saver.failure is None:
            self._end("finished")
        else:
            self._fail(f"the last epoch could not be saved, which the same command tries again: {self.saver.failure}")

    def fail(self, message: str) -> None:
        """Ends the run for good, without another try by Ray Train."""
        self._finish_saving()
        self._fail(message)

    def close(self) -> None:
        self.watchdog.end()
        if self.records:
            self.notices.close()

    def _find_micro_batch(self, batch: Batch) -> None:
        if self.records:
            self.saver.wait(meanwhile=self.watchdog.beat)  # or the snapshot that is being written would count twice
        self.watchdog.beat(patiently=True)
        self.stepper.search(batch)
        if self.records:
            write_found(self.folder, torch.cuda.get_device_name(self.state.device), self.stepper.found_sizes)
            self._event("micro_batch", micro_batch=self.stepper.micro_batch)
            self._flush_beside()

    def _found_sizes(self) -> dict[Phase, int]:
        """The micro-batches that the run found earlier, on a GPU of the same name."""
        if self.state.device.type != "cuda":
            return {}
        found = read_found(self.folder, torch.cuda.get_device_name(self.state.device)) if self.rank == 0 else None
        return cast(dict[Phase, int], _from_rank_0(found))

    def _act(self, action: Action) -> None:
        """What rank 0 asked for, on every worker."""
        if action is Action.NONE:
            return
        self.stepper.check_finite()
        sums = self.stepper.worker_sums()
        if self.records:
            self._save(sums, 0.0 if action is Action.SAVE else math.inf)
        if action is Action.SAVE:
            return
        self._finish_saving()
        if not self.records:
            self._finish_audit()
        else:
            kind: EndKind = "stop" if action is Action.STOP else "preemption"
            self._event(kind)
            with contextlib.suppress(OSError) if action is Action.STOP else contextlib.nullcontext():
                self._end(kind)
        raise StoppedError

    def _ends_trunk_window(self, epoch: int) -> bool:
        """Whether a fork may begin behind an epoch (from 0)."""
        is_trunk = self.settings.checkpoint.keep_trunk and self._phase is Phase.FULL
        return is_trunk and (epoch + 1) % self.settings.method.window_epochs == 0

    def _save(self, sums: list[list[float]], seconds: float, val_top1: float | None = None) -> None:
        """Saves, unless another save is still under way after so many seconds: where the next one is as good, that is left out.

        The other workers wait for rank 0 meanwhile, and have to know where that may be for long.
        """

        def snapshot() -> Snapshot:
            return self.state.snapshot(sums, holds_base=self.checkpoints.holds_base, val_top1=val_top1)

        has_begun = self.saver.start(snapshot, seconds, self.watchdog.beat)
        self._record_saves()
        if has_begun:
            self.notices.saved(self.state.step)

    def _finish_saving(self) -> None:
        """Waits for the save under way. Where it failed, tries again a few times: what it holds is the last of the run."""
        if not self.records:
            return
        self.saver.wait(meanwhile=self.watchdog.beat)
        end = time.monotonic() + self.settings.workers.hang_seconds
        while self.saver.failure is not None and time.monotonic() < end:
            time.sleep(self.settings.workers.hang_seconds / _LAST_SAVES)
            self.saver.retry(self.watchdog.beat)
        self._record_saves()

    def _fail(self, message: str) -> None:
        if not self.records:
            return
        try:
            names = self.checkpoints.names()
            newest = self.checkpoints.folder / names[-1] if names else None
            where = f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"
        except OSError as error:
            where = f"its checkpoints cannot be listed ({error})"
        self._event("run_failed", message=f"{message}; {where}")
        with contextlib.suppress(OSError):
            self._end("failed", f"{message}; {where}")

    def _end(self, kind: EndKind, message: str | None = None) -> None:
        """Writes how the attempt ends, once all that it recorded is there: trying as long as for a last save.

        Raises OSError where there is no room even so: the attempt has failed. Where no other one is to follow, the driver
        tells that the record is missing.
        """
        end = End(kind, self.state.epoch, self.state.step, message)
        self._finish_flushing(lambda: write_end(self.folder, end))

    def _finish_audit(self) -> None:
        """Of a worker that records nothing else."""
        with contextlib.suppress(OSError):  # no reason to train again
            self._finish_flushing()

    def _flush_beside(self) -> None:
        """Has the run folder hold what was recorded, as soon as it can. What an earlier flush holds up waits for the next."""
        if not self._flushing.is_busy:
            self._flushing.begin(self._flush)

    def _finish_flushing(self, then: Callable[[], None] = lambda: None) -> None:
        """Returns once the run folder holds all that was recorded, and `then` has worked after that.

        Tries as long as for a last save, and raises OSError where that is in vain.
        """
        hang_seconds = self.settings.workers.hang_seconds
        has_waited = self.records is not None and self.saver.failure is not None  # for the last save
        end = time.monotonic() + (0.0 if has_waited else hang_seconds)
        self._flushing.wait(meanwhile=self.watchdog.beat)
        while (failure := self._try_to_finish(then)) is not None:
            if not isinstance(failure, OSError) or time.monotonic() > end:
                raise failure
            self.watchdog.beat()
            time.sleep(hang_seconds / _LAST_SAVES)

    def _try_to_finish(self, then: Callable[[], None]) -> Exception | None:
        """Why it failed; None where it has not."""
        failures: list[Exception] = []

        def work() -> None:
            try:
                if not self._flush():
                    raise OSError(f"no room for the records in {self.folder}, or it cannot be reached")
                then()
            except Exception as failure:
                failures.append(failure)

        self._flushing.begin(work)
        self._flushing.wait(meanwhile=self.watchdog.beat)
        return failures[0] if failures else None

    def _flush(self) -> bool:
        """Returns whether the run folder holds all that was recorded."""
        flushes = [self.audit.flush] if self.audit else []
        if self.records:
            flushes += [self._write_ranks, self.records.flush, self.board.flush]
        return all(flush() for flush in flushes)  # where one fails, the others would too

    def _record_saves(self) -> None:
        assert self.records
        for saved in self.saver.results():
            self.run_telemetry.saved(saved)
            if saved.error is None:
                self._event("checkpoint", checkpoint=saved.name, seconds=saved.seconds)
            else:
                self._event("checkpoint_failed", checkpoint=saved.name, seconds=saved.seconds, message=saved.error)

    def _record_start(self, start: Start) -> None:
        assert self.records
        for name, message in start.damaged.items():
            self._event("checkpoint_damaged", message=message)
            with contextlib.suppress(OSError):  # where it stays, the next attempt finds it again
                self.checkpoints.set_aside(name)
        world_size = self.state.world_size
        content: dict[str, Any] = {"world_size": world_size, "reservation": reservation()}
        if self.attempt == 0:
            self._event("run_started", seed=self.settings.train.seed, **content)
        else:
            lost = max(0, start.last_step - self.state.step)
            self._event("restart", cause=start.cause, seconds=start.seconds, steps_again=lost, **content)
            if start.world_size != world_size:
                self._event("resize", world_size=world_size, before=start.world_size)
        for sentence in self.state.pretrained_notes:
            self._event("init_from", message=sentence)
        if self.state.fork is not None:
            self._record_change(self.state.fork)
        self._write_ranks()
        self.records.flush_events()

    def _record_change(self, decision: Decision) -> None:
        if decision.switch is None and not decision.freeze:
            return
        phases = self.state.phases
        trainable, parameters = count_parameters(self.state.model)
        content: dict[str, Any] = {
            "trainable_parameters": trainable,
            "parameters": parameters,
            "format": self.state.format,
            "logit_change": self.state.logit_change,
        }
        if decision.switch is not None:
            self._event("switch", switch_epoch=phases.switched_at, **content)
        if decision.freeze:
            self._event("freeze", freeze_epoch=phases.frozen_at, **content)

    def _write_ranks(self) -> bool:
        """Writes ranks.json once in an attempt, from what every checkpoint holds too; returns whether it is there, if due."""
        ranks = self.state.phases.ranks
        if ranks is not None and not self._wrote_ranks:
            with contextlib.suppress(OSError):
                self.folder.write_json("ranks.json", ranks)
                self._wrote_ranks = True
        return ranks is None or self._wrote_ranks

    def _diagnose(self, line: dict[str, Any]) -> None:
        """Records failure signatures, each once."""
        method = self.settings.method
        self._lines.append(line)
        for finding in diagnose(self._lines, self.state.phases.ranks, len(rank_choices(method.r_min, method.r_max))):
            if finding.signature not in self._diagnosed:
                self._diagnosed.add(finding.signature)
                self._event("diagnosis", **asdict(finding))
                self.run_telemetry.diagnosis(finding.signature)

    def _event(self, event: str, **content: Any) -> None:
        assert self.records
        state = self.state
        self.records.event(event, epoch=state.epoch, step=state.step, phase=state.phases.phase, **content)

    def _progress(self, **content: Any) -> None:
        assert self.records
        state = self.state
        place = {"epoch": state.epoch, "batch": state.batch, "batches": state.batches, "step": state.step}
        if not self._telling.is_busy:
            self._telling.begin(functools.partial(self.records.progress, **place, phase=state.phases.phase, **content))


def _reached(folder: RunFolder) -> RunFolder:
    """The folder, once it answers."""
    folder.exists("config.yaml")
    return folder


def _from_rank_0(content: Any) -> Any:
    """What rank 0 passes in, on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return content
    box = [content]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _peak_memory_bytes(device: torch.device) -> int:
    """On a GPU the most that was allocated since the phase was built; on a CPU the most that the process ever held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _own_sums(sums: list[list[float]], rank: int, world_size: int) -> tuple[float, float]:
    """This worker's share of the sums in a checkpoint: its own, or with another number of workers all of them on rank 0."""
    if len(sums) == world_size:
        return sums[rank][0], sums[rank][1]
    if rank != 0:
        return 0.0, 0.0
    return sum(entry[0] for entry in sums), sum(entry[1] for entry in sums)
