"""Many runs of a recipe for small images, and forks of them, in one process: no start of Ray, every image decoded once.

    python benchmarks/side_by_side.py PLAN OUT

PLAN is YAML: `recipe`, `set` (settings of all runs), and `runs`, a list of {name, set}. A fork has `of` too, the name
of the run that it leaves, and `after`, the epochs behind which it does; `until` ends a run early, as one that is there
for its forks alone. OUT gets a line of JSON for each epoch.

The engine gets the same images in the same order as from `prelora train` on one worker, so that losses are the same. A
fork of 20 epochs, of which starting, compiling and decoding would be most, is then little more than its steps. All
images of all epochs are in memory: 3 kB for one of 32 pixels, 18 GB for 120 epochs of CIFAR-10. The recipe's
`train.micro_batch` must be a number, or null.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import mmap
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from prelora_ray.config import Settings
from prelora_ray.config_file import load_settings
from prelora_ray.data.augment import Augmentation, Augmenter, Pixels
from prelora_ray.data.batch import Batch, StreamPlan
from prelora_ray.data.manifest import Split, read_manifest
from prelora_ray.data.rows import RowReader
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.method.phases import Phase
from prelora_ray.method.targets import target_norms
from prelora_ray.records import NormsLine
from prelora_ray.schedule import decide, phase_schedule
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan, validates

_PIECE = 2500
"""Images that a decoder takes on at once."""
_encoded: dict[Split, list[bytes]] = {}
_pixels: dict[Epoch, Pixels] = {}
"""Both are in memory that the decoders share, which are forks of this process."""


class Epoch(NamedTuple):
    """What the images of an epoch depend on."""

    seed: int
    split: Split
    epoch: int
    augmentation: Augmentation
    crop_ratio: float


@dataclass
class Run:
    name: str
    settings: Settings
    plan: StreamPlan
    of: str | None
    after: int
    until: int

    def images(self, split: Split, epoch: int) -> Epoch:
        numbered = epoch if split == "train" else 0  # validation is the same each time
        augmentation = self.plan.augmentation_of(split, epoch)
        return Epoch(self.plan.seed, split, numbered, augmentation, self.plan.crop_ratio)


class Images:
    """The images of all epochs, decoded in the background in the order in which the runs take them."""

    def __init__(self, path: str, runs: list[Run]) -> None:
        self.labels = {}
        manifest = read_manifest(Storage(path))
        for split in ("train", "val"):
            reader, ids = RowReader(path, tuple(manifest.splits[split])), np.arange(runs[0].plan.orders[split].num_rows)
            reader.expect(ids)
            encoded, labels = reader.take(ids)
            _encoded[split] = encoded.to_pylist()
            self.labels[split] = torch.from_numpy(labels.to_numpy().copy())
        epochs = dict.fromkeys(
            run.images(split, epoch) for run in runs for epoch in range(run.after, run.until) for split in ("train", "val")
        )
        shapes = [(len(_encoded[of.split]), of.augmentation.image_size, of.augmentation.image_size, 3) for of in epochs]
        ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        room = mmap.mmap(-1, int(ends[-1]))
        for of, shape, start in zip(epochs, shapes, ends, strict=False):
            _pixels[of] = np.ndarray(shape, np.uint8, room, int(start))
        self._decoders = ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1), multiprocessing.get_context("fork"))
        self._work = {of: [self._decoders.submit(_decode, of, i) for i in range(0, len(_pixels[of]), _PIECE)] for of in epochs}

    def batches(self, run: Run, split: Split, epoch: int) -> Iterator[Batch]:
        of, order = run.images(split, epoch), run.plan.orders[split]
        for work in self._work[of]:
            work.result()
        drawn = order.epoch(epoch)
        for batch in range(order.num_batches):
            ids = order.slots(drawn, batch, run.plan.cells, run.plan.num_slots)
            labels = torch.where(torch.from_numpy(ids) >= 0, self.labels[split][ids], -1)
            yield Batch(split, epoch, batch, torch.from_numpy(_pixels[of][ids]), labels, ids)

    def close(self) -> None:
        self._decoders.shutdown(cancel_futures=True)


def _decode(of: Epoch, start: int) -> None:
    augmenter, pixels = _augmenter(of.augmentation, of.seed, of.crop_ratio), _pixels[of]
    for sample in range(start, min(start + _PIECE, len(pixels))):
        encoded = _encoded[of.split][sample]
        is_train = of.split == "train"
        pixels[sample] = augmenter.train(encoded, of.epoch, sample) if is_train else augmenter.evaluate(encoded)


@functools.cache
def _augmenter(augmentation: Augmentation, seed: int, crop_ratio: float) -> Augmenter:
    return Augmenter(augmentation, seed, crop_ratio)


class Trainer:
    """Trains runs in turn, and keeps what forks of them need."""

    def __init__(self, runs: list[Run], images: Images, out: Path) -> None:
        self._forked = {(run.of, run.after) for run in runs}
        self._images = images
        self._out = out
        self._kept: dict[tuple[str, int], Snapshot] = {}
        self._records: dict[str, list[NormsLine]] = {}

    def train(self, run: Run) -> None:
        settings, plan = run.settings, run.plan
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trunk = None if run.of is None else copy.deepcopy(self._kept[run.of, run.after])  # whose moments it goes on with
        record = [] if run.of is None else self._records[run.of][: run.after]
        state = TrainState(settings, len(plan.manifest.classes), plan.orders["train"].num_batches, device, 1, trunk)
        if run.of is not None and settings.method.enabled:
            schedule = phase_schedule(settings.method, settings.train.ramp_epochs, [target.name for target in state.targets])
            decide(schedule, record)
            assert schedule.switched_at == run.after, f"{run.name} switches after epoch {schedule.switched_at}"
            state.enter(Phase.WARMUP, schedule.ranks)
        step = TrainStep(state, plan)
        for epoch in range(run.after, run.until):
            begin, phase, size = time.monotonic(), state.phases.phase, state.image_size
            step.begin_epoch()
            for batch in self._images.batches(run, "train", epoch):
                step.train(batch)
                state.batch += 1
            total, images = step.epoch_sums()  # waits for the device
            loss, seconds = total / images, time.monotonic() - begin
            step.check_finite()
            validated = validates(settings, epoch)
            top1 = step.evaluate(self._images.batches(run, "val", epoch))[0].top1 if validated else None
            norms = target_norms(state.model, state.targets)
            record.append(NormsLine(attempt=0, epoch=epoch, phase=phase.value, loss=loss, norms=norms))
            decision = state.phases.end_epoch(epoch, norms, loss)
            state.epoch, state.batch = epoch + 1, 0
            state.apply(decision)
            self._tell(run, epoch=epoch, phase=phase.value, image_size=size, loss=loss, top1=top1, seconds=seconds)
            if (run.name, epoch + 1) in self._forked:
                self._kept[run.name, epoch + 1] = state.snapshot([], holds_base=False)
        self._records[run.name] = record

    def _tell(self, run: Run, **of_epoch: Any) -> None:
        with self._out.open("a") as file:
            file.write(json.dumps({"run": run.name, "seed": run.plan.seed, **of_epoch}) + "\n")


def read_plan(path: Path) -> list[Run]:
    content = yaml.safe_load(path.read_text())
    runs = []
    for entry in content["runs"]:
        settings = load_settings(content["recipe"], [*content.get("set", []), *entry.get("set", [])], name=entry["name"])
        plan = stream_plan(settings, read_manifest(Storage(settings.data.path)), 0, 1)
        until = entry.get("until", settings.train.epochs)
        runs.append(Run(entry["name"], settings, plan, entry.get("of"), entry.get("after", 0), until))
    return runs


def main(plan: Path, out: Path) -> None:
    torch._dynamo.reset = lambda: None  # type: ignore[assignment]  # what is compiled serves the next runs too
    runs = read_plan(plan)
    images = Images(runs[0].settings.data.path, runs)  # forks before this process uses a GPU
    trainer = Trainer(runs, images, out)
    for run in runs:
        trainer.train(run)
    images.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    main(**vars(parser.parse_args()))
