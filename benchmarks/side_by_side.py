"""Many runs of a recipe for small images, and forks of them, in one process: no start of Ray, every image decoded once.

    python benchmarks/side_by_side.py PLAN OUT

PLAN is YAML: `recipe`, `set` (settings of all runs), and `runs`, a list of {name, set}. A fork has `of` too, the name
of the run that it leaves, and `after`, the epochs behind which it does; `until` ends a run early, as one that is there
for its forks alone. OUT, a new file, gets a line of JSON for each epoch.

A fork that switches may have a `rule` (`rank_rules.py` tells them), by which it gets its ranks: `paper`, `uniform`,
`mlp`, `gradient`, `spectral`, `first_order` or `eva`. Its adapters have at most as many parameters as the settings' own
ranks would take, those of `method.rank_pattern` or the paper's. A window is the last `method.window_epochs` epochs of
the trunk, and gradients and inputs are those of the first 8 batches of its last epoch. Each line of such a fork says
`rule`, its first one `ranks` as well (by family and layer), `adapter_parameters` and their `budget`, and the first of
each phase `trainable`, the share of all parameters that trains.

A run whose loss is not finite ends there, with a line that has its `error`; so do its forks, and all others go on. The
exit status is then 1.

A run of full training from the first epoch on may have `criteria: true`. At the end of each window it gets a line more,
with candidates for the criterion of a switch (`switch_criteria.py` tells them, `criteria.py` reads them). Their losses
are those of the 4,096 first training images, as evaluation takes them; `prelora prepare` has shuffled them.

The engine gets the same images in the same order as from `prelora train` on one worker, so that losses are the same. A
trunk is full training (`method.enabled: false`). All images of all epochs are in memory: 3 kB for one of 32 pixels,
18 GB for 120 epochs of CIFAR-10.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import mmap
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from evidence import Weights, evidence_of, weights_of
from prelora_ray.config import Settings
from prelora_ray.config_file import load_settings
from prelora_ray.data.augment import Augmentation, Augmenter, Pixels
from prelora_ray.data.batch import Batch, StreamPlan
from prelora_ray.data.image_rows import COLUMNS, ImageRows
from prelora_ray.data.manifest import Split, read_manifest
from prelora_ray.data.rows import RowReader
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import NonFiniteLossError, TrainStep
from prelora_ray.method.phases import Phase, count_parameters
from prelora_ray.method.ranks import rank_choices
from prelora_ray.method.targets import target_norms
from prelora_ray.records import NormsLine
from prelora_ray.schedule import decide, phase_schedule
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan, validates
from rank_rules import RULES, Evidence, Limits, Ranks, adapter_parameters, by_family
from window_meter import WindowMeter

_PIECE = 2500
"""Images that a decoder takes on at once."""
_MEASURED = 8
"""Batches that rules of ranks see gradients and inputs of."""
_FIXED = 4096
"""Training images that criteria of a switch see the loss of."""
# What the decoders, which are forks of this process, see of it.
_encoded: dict[Split, list[bytes]] = {}
_pixels: dict[Key, Pixels] = {}


class Key(NamedTuple):
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
    rule: str | None
    criteria: bool

    @property
    def window_from(self) -> int:
        """Epochs that are done when the last window in front of it begins."""
        return self.after - self.settings.method.window_epochs

    def is_trunk(self, after: int, seed: int) -> bool:
        """Whether a fork of the seed may leave it after so many epochs."""
        return self.after < after <= self.until and not self.settings.method.enabled and self.settings.train.seed == seed

    def key(self, split: Split, epoch: int) -> Key:
        numbered = epoch if split == "train" else 0  # validation is the same each time
        rows = self.plan.rows
        assert isinstance(rows, ImageRows)
        return Key(rows.seed, split, numbered, rows.augmentation_of(split, epoch), rows.crop_ratio)


class Images:
    """The images of all epochs, decoded in the background in the order in which the runs take them."""

    def __init__(self, path: str, runs: list[Run]) -> None:
        self.labels = {}
        manifest = read_manifest(Storage(path))
        for split in ("train", "val"):
            ids = np.arange(runs[0].plan.orders[split].num_rows)
            columns = RowReader(path, manifest.splits[split], COLUMNS).read(ids)
            _encoded[split] = columns["image"].to_pylist()
            self.labels[split] = torch.from_numpy(columns["label"].to_numpy().copy())
        epochs = [(run, epoch) for run in runs for epoch in range(run.after, run.until)]
        for key in dict.fromkeys(run.key(split, epoch) for run, epoch in epochs for split in ("train", "val")):
            shape = len(_encoded[key.split]), key.augmentation.image_size, key.augmentation.image_size, 3
            _pixels[key] = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)  # shared with forks
        self._decoders = ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1), multiprocessing.get_context("fork"))
        self._work = {
            key: [self._decoders.submit(_decode, key, start) for start in range(0, len(pixels), _PIECE)]
            for key, pixels in _pixels.items()
        }

    def batches(self, run: Run, split: Split, epoch: int) -> Iterator[Batch]:
        key, order = run.key(split, epoch), run.plan.orders[split]
        for work in self._work[key]:
            work.result()
        drawn = order.epoch(epoch, run.plan.cells)
        for batch in range(order.num_batches):
            ids = order.slots(drawn, batch, run.plan.cells, run.plan.num_slots)
            labels = torch.where(torch.from_numpy(ids) >= 0, self.labels[split][ids], -1)
            yield Batch(split, epoch, batch, {"images": torch.from_numpy(_pixels[key][ids]), "labels": labels}, ids)

    def fixed(self, run: Run) -> Batch:
        """The first training images as evaluation takes them: the same in all runs and epochs."""
        key, ids = run.key("val", 0), np.arange(min(_FIXED, len(_encoded["train"])))
        augmenter = _augmenter(key.augmentation, key.seed, key.crop_ratio)
        images = np.stack([augmenter.evaluate(_encoded["train"][sample]) for sample in ids])
        return Batch("train", 0, 0, {"images": torch.from_numpy(images), "labels": self.labels["train"][ids]}, ids)

    def close(self) -> None:
        self._decoders.shutdown(cancel_futures=True)


def _decode(key: Key, start: int) -> None:
    augmenter, pixels = _augmenter(key.augmentation, key.seed, key.crop_ratio), _pixels[key]
    for sample in range(start, min(start + _PIECE, len(pixels))):
        encoded = _encoded[key.split][sample]
        is_train = key.split == "train"
        pixels[sample] = augmenter.train(encoded, key.epoch, sample) if is_train else augmenter.evaluate(encoded)


@functools.cache
def _augmenter(augmentation: Augmentation, seed: int, crop_ratio: float) -> Augmenter:
    return Augmenter(augmentation, seed, crop_ratio)


class NoTrunkError(RuntimeError):
    """The run that a fork leaves has ended before."""


class Trainer:
    """Trains runs in turn, and keeps what forks of them need."""

    def __init__(self, runs: list[Run], images: Images, out: Path) -> None:
        self._forked = {(run.of, run.after) for run in runs}
        self._images = images
        self._out = out
        self._kept: dict[tuple[str, int], Snapshot] = {}
        self._windows = {(run.of, run.window_from, run.after) for run in runs if run.rule is not None}
        self._weights: dict[tuple[str, int], Weights] = {}
        self._evidence: dict[tuple[str, int, int], Evidence] = {}
        self._of_rule: dict[str, dict[str, Any]] = {}
        self._records: dict[str, list[NormsLine]] = {}

    def train(self, run: Run) -> None:
        settings, plan = run.settings, run.plan
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trunk, record = (None, []) if run.of is None else self._fork(run, run.of)
        state = TrainState(settings, len(plan.manifest.classes), plan.orders["train"].num_batches, device, 1, trunk)
        step = TrainStep(state, plan)
        self._keep(run, step)
        meter = WindowMeter(step, self._images.fixed(run)) if run.criteria else None
        for epoch in range(run.after, run.until):
            begin, phase, size = time.monotonic(), state.phases.phase, state.image_size
            of_rule = self._told_of_rule(run, state, epoch)
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
            self.tell(run, epoch=epoch, phase=phase.value, image_size=size, loss=loss, top1=top1, seconds=seconds, **of_rule)
            if meter is not None:
                meter.end_epoch()
                if decision.verdict is not None:
                    self.tell(run, **meter.end_window(decision.verdict, [line.loss for line in record]))
            self._keep(run, step)
        self._records[run.name] = record

    def _keep(self, run: Run, step: TrainStep) -> None:
        """Keeps what forks of a run need of it as it is now."""
        name, now = run.name, step.state.epoch
        if (name, now) in self._forked:
            self._kept[name, now] = step.state.snapshot([], holds_base=False)
        windows = [(begin, end) for of, begin, end in self._windows if of == name]
        if any(begin == now for begin, _ in windows):
            self._weights[name, now] = weights_of(step.state)
        for begin in {begin for begin, end in windows if end == now}:
            batches = itertools.islice(self._images.batches(run, "train", now - 1), _MEASURED)
            self._evidence[name, begin, now] = evidence_of(step, self._weights[name, begin], batches)

    def _fork(self, run: Run, trunk: str) -> tuple[Snapshot, list[NormsLine]]:
        """Where a run leaves its trunk, as `sweep/fork.py` has it: the checkpoint, and the record up to there."""
        if trunk not in self._records:
            raise NoTrunkError(f"{trunk} came to no end")
        settings, record = run.settings, self._records[trunk][: run.after]
        schedule = phase_schedule(settings.method, settings.train.ramp_epochs, list(record[0].norms))
        decide(schedule, record)
        if settings.method.enabled and schedule.switched_at != run.after:
            raise ValueError(f"{run.name} switches after epoch {schedule.switched_at}, and leaves {trunk} after {run.after}")
        if run.rule is not None:
            assert schedule.ranks is not None, "it has switched"
            schedule.ranks = self._by_rule(run, run.rule, schedule.ranks)
        snapshot = copy.deepcopy(self._kept[trunk, run.after])  # a run trains its moments
        snapshot.state |= {"phases": schedule.state_dict(), "fork": schedule.phase is not Phase.FULL}
        return snapshot, record

    def _by_rule(self, run: Run, rule: str, paper: Ranks) -> Ranks:
        """The ranks that a rule gives at the budget of `paper`, which is what the settings alone would have."""
        assert run.of is not None, "a fork"
        evidence, method = self._evidence[run.of, run.window_from, run.after], run.settings.method
        budget = adapter_parameters(paper, evidence.sides)
        limits = Limits(rank_choices(method.r_min, method.r_max), budget, method.normalize, run.settings.train.seed)
        begin = time.monotonic()
        ranks = RULES[rule](evidence, limits, paper)
        self._of_rule[run.name] = {
            "ranks": by_family(ranks),
            "adapter_parameters": adapter_parameters(ranks, evidence.sides),
            "budget": budget,
            "rule_seconds": time.monotonic() - begin,
        }
        return ranks

    def _told_of_rule(self, run: Run, state: TrainState, epoch: int) -> dict[str, Any]:
        """What the line of an epoch that begins says of the rule of the run's ranks."""
        if run.rule is None:
            return {}
        told = {"rule": run.rule} | (self._of_rule[run.name] if epoch == run.after else {})
        if epoch in (run.after, state.phases.frozen_at):
            trainable, total = count_parameters(state.model)
            told["trainable"] = trainable / total
        return told

    def tell(self, run: Run, **content: Any) -> None:
        """Of an epoch, a window, or why the run ends."""
        with self._out.open("a") as file:
            of = {"of": run.of} if run.of is not None else {}
            file.write(json.dumps({"run": run.name, **of, "seed": run.settings.train.seed, **content}) + "\n")


def read_plan(path: Path) -> list[Run]:
    """Raises ValueError where a name stands twice, a fork's trunk is not in front of it, in phase full there and of its
    seed, runs take different images, a rule of ranks is unknown or given to a run that does not switch as it leaves a
    trunk that has trained for a window, or criteria are asked of a run that is no full training from the beginning."""
    content = yaml.safe_load(path.read_text())
    runs: dict[str, Run] = {}
    for entry in content["runs"]:
        name, of, after, rule = entry["name"], entry.get("of"), entry.get("after", 0), entry.get("rule")
        settings = load_settings(content["recipe"], [*content.get("set", []), *entry.get("set", [])], name=name)
        plan = stream_plan(settings, read_manifest(Storage(settings.data.path)), 0, 1)
        if name in runs:
            raise ValueError(f"{name} stands twice in the plan")
        if of is None and after:
            raise ValueError(f"{name} begins after epoch {after}, and has no run that it leaves")
        if of is not None and not (of in runs and runs[of].is_trunk(after, settings.train.seed)):
            raise ValueError(f"{name} cannot leave {of} after epoch {after}: no such full training is in front of it")
        if rule is not None and rule not in RULES:
            raise ValueError(f"{name} has rule {rule}: known are {', '.join(RULES)}")
        if rule is not None and (of is None or not settings.method.enabled):
            raise ValueError(f"{name} has rule {rule}, and is no fork that switches")
        if rule is not None and of is not None and after - settings.method.window_epochs < runs[of].after:
            raise ValueError(f"{name} has rule {rule}, and leaves {of} in front of the end of its first window")
        if entry.get("criteria", False) and (of is not None or settings.method.enabled):
            raise ValueError(f"{name} has criteria, and is no full training from its first epoch on")
        if runs and settings.data != next(iter(runs.values())).settings.data:
            raise ValueError(f"{name} has another section data than the runs in front of it")
        until, criteria = entry.get("until", settings.train.epochs), entry.get("criteria", False)
        runs[name] = Run(name, settings, plan, of, after, until, rule, criteria)
    return list(runs.values())


def main(plan: Path, out: Path) -> None:
    runs = read_plan(plan)
    out.touch(exist_ok=False)
    failed = []
    with closing(Images(runs[0].settings.data.path, runs)) as images:  # forks before this process uses a GPU
        trainer = Trainer(runs, images, out)
        for run in runs:
            try:
                trainer.train(run)
            except (NonFiniteLossError, NoTrunkError) as error:
                trainer.tell(run, error=str(error))
                failed.append(f"{run.name}: {error}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    main(**vars(parser.parse_args()))
