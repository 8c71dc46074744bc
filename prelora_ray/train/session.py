"""What the loop calls: one attempt of a run on one worker, its records and its checkpoints."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import ray.train
import torch
import torch.distributed as dist

from prelora_ray.config import Settings
from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.stream import Batch
from prelora_ray.method.phases import Decision, count_parameters
from prelora_ray.method.targets import target_norms
from prelora_ray.run_folder import LineWriter, RunFolder, RunRecords
from prelora_ray.storage import Storage
from prelora_ray.train.checkpoint import Checkpoints
from prelora_ray.train.evaluation import Evaluation
from prelora_ray.train.feed import Feed, stream_plan, validates
from prelora_ray.train.state import TrainState
from prelora_ray.train.step import Stepper

_CHECK_STEPS = 50
"""Steps between looks whether the loss is still finite, each of which waits for the device."""


class Session:
    """One worker's part in one attempt. Every worker trains; rank 0 also decides, records and saves."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        context = ray.train.get_context()
        self.rank, world_size = context.get_world_rank(), context.get_world_size()
        self.folder = RunFolder.of(settings)
        self.checkpoints = Checkpoints(self.folder)
        start = _from_rank_0(self._where_to_start() if self.rank == 0 else None)
        self.attempt: int = start["attempt"]
        manifest = read_manifest(Storage(settings.data.path))
        self.plan = stream_plan(settings, manifest, self.rank, world_size)
        device = ray.train.torch.get_device()
        batches = self.plan.orders["train"].num_batches
        checkpoint = self.checkpoints.load(start["checkpoint"]) if start["checkpoint"] is not None else None
        self.state = TrainState(settings, len(manifest.classes), batches, device, world_size, checkpoint)
        self.stepper = Stepper(self.state, self.plan)
        self.records = RunRecords(self.folder, self.attempt) if self.rank == 0 else None
        self.audit = LineWriter(self.folder, f"samples-{self.rank}.jsonl") if settings.audit_samples else None
        if self.records:
            for message in start["damaged"]:
                self.records.event("checkpoint_damaged", message=message)
            self._event("run_started" if self.attempt == 0 else "restart", world_size=world_size, seed=settings.train.seed)
            for sentence in self.state.pretrained_notes:
                self._event("init_from", message=sentence)
        self.feed = Feed(settings, self.plan, (self.state.epoch, self.state.batch), context.get_local_world_size())

    def begin_epoch(self) -> None:
        self._epoch_time = time.monotonic()
        self._phase = self.state.phases.phase
        self.feed.wait_seconds = 0.0
        self.stepper.begin_epoch()
        if self.state.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def step(self, batch: Batch) -> None:
        if self.audit:
            ids = [int(i) for i in batch.ids if i >= 0]
            self.audit.write(attempt=self.attempt, epoch=batch.epoch, batch=batch.batch, samples=ids)
        self.stepper.train(batch)
        self.state.batch += 1
        if self.state.batch % _CHECK_STEPS == 0:
            self.stepper.check_finite()
        if self.records and self.records.progress_is_due():
            seconds = time.monotonic() - self._epoch_time
            images = self.state.batch * self.settings.data.batch_size
            self._progress(loss=self.stepper.local_loss(), images_per_second=images / seconds)

    def mean_loss(self) -> float:
        """Mean training loss over the epoch's images, of all workers."""
        self.stepper.check_finite()
        loss, self._images = self.stepper.epoch_sums()
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
                verdict = decision.verdict
                line = {
                    "window": verdict.window.index,
                    "epoch_end": verdict.window.epoch_end,
                    "phase": self._phase,
                    "loss": verdict.window.loss,
                    "change": verdict.family_change,
                    "loss_change": verdict.loss_change,
                    "converged": verdict.converged,
                    "in_ramp": verdict.in_ramp,
                }
                self.records.window(**line)
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
            "images_per_second": self._images / self._train_seconds,
            "images": self._images,
            "train_seconds": self._train_seconds,
            "seconds": time.monotonic() - self._epoch_time,
            "data_wait_seconds": self._wait_seconds,
            "peak_memory_bytes": _peak_memory_bytes(self.state.device),
            "trainable_parameters": trainable,
            "parameters": parameters,
            "learning_rate": self.stepper.learning_rate,
            "world_size": self.state.world_size,
        }
        self.state.epoch, self.state.batch = epoch + 1, 0
        self.state.apply(decision)
        if self.records:
            self.records.epoch(**line)
            self._record_change(decision)
        if self._saves(epoch, decision):
            self._save()
        if self.audit:
            self.audit.flush()
        if self.records:
            self.records.flush()
        self._report(line, decision)

    def fail(self, message: str) -> None:
        """Ends the run for good, without another try by Ray Train."""
        if self.records:
            names = self.checkpoints.names()
            where = (
                f"the last good checkpoint is {self.checkpoints.folder / names[-1]}" if names else "no checkpoint was saved yet"
            )
            self._event("run_failed", message=f"{message}; {where}")
            self.records.flush()

    def _where_to_start(self) -> dict[str, Any]:
        name, damaged = self.checkpoints.newest()
        return {"attempt": self.folder.next_attempt(), "checkpoint": name, "damaged": damaged}

    def _saves(self, epoch: int, decision: Decision) -> bool:
        settings = self.settings
        due = (epoch + 1) % settings.checkpoint.every_epochs == 0 or epoch + 1 == settings.train.epochs
        return due or decision.switch is not None or decision.freeze

    def _save(self) -> None:
        if not self.records:
            return
        start = time.monotonic()
        checkpoint = self.state.checkpoint()
        self.checkpoints.save(checkpoint)
        phases = self.state.phases
        also = {f"{epoch:05d}-000000" for epoch in (phases.switched_at, phases.frozen_at) if epoch is not None}
        self.checkpoints.prune(self.settings.checkpoint.keep, also)
        self._event("checkpoint", checkpoint=checkpoint.name, seconds=time.monotonic() - start)

    def _record_change(self, decision: Decision) -> None:
        phases = self.state.phases
        if decision.switch is not None:
            self.folder.write_json("ranks.json", decision.switch)
            trainable, parameters = count_parameters(self.state.model)
            self._event("switch", switch_epoch=phases.switched_at, trainable_parameters=trainable, parameters=parameters)
        if decision.freeze:
            trainable, parameters = count_parameters(self.state.model)
            self._event("freeze", freeze_epoch=phases.frozen_at, trainable_parameters=trainable, parameters=parameters)

    def _report(self, line: dict[str, Any], decision: Decision) -> None:
        """Tells Ray Train of the epoch, with a tiny checkpoint that points to ours."""
        phases, method = self.state.phases, self.settings.method
        metrics = {
            **line,
            "trainable_fraction": line["trainable_parameters"] / line["parameters"],
            "next_phase": phases.phase.value,
            "switch_epoch": phases.switched_at,
            "freeze_epoch": phases.frozen_at,
            "tau": method.tau,
            "zeta": method.zeta,
            "norm_change": decision.verdict and decision.verdict.family_change,
            "loss_change": decision.verdict and decision.verdict.loss_change,
            "converged": decision.verdict and decision.verdict.converged,
            "ranks": phases.ranks and _summary(list(phases.ranks.values())),
        }
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            names = self.checkpoints.names()
            pointer = {"run": str(self.folder), "checkpoint": names[-1] if names else None}
            Path(directory, "pointer.json").write_text(json.dumps(pointer))
            ray.train.report(metrics, ray.train.Checkpoint.from_directory(directory))

    def _event(self, event: str, **content: Any) -> None:
        assert self.records
        state = self.state
        self.records.event(event, epoch=state.epoch, step=state.step, phase=state.phases.phase, **content)

    def _progress(self, **content: Any) -> None:
        assert self.records
        self.records.progress(
            epoch=self.state.epoch, batch=self.state.batch, batches=self.state.batches, phase=self.state.phases.phase, **content
        )


def _from_rank_0(content: Any) -> Any:
    """What rank 0 passes in, on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return content
    box = [content]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _peak_memory_bytes(device: torch.device) -> int:
    """On a GPU the most that was allocated in this epoch; on a CPU the most that the process ever held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _summary(ranks: list[int]) -> dict[str, Any]:
    counts = {str(rank): ranks.count(rank) for rank in sorted(set(ranks))}
    return {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks), "counts": counts}
