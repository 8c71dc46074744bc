"""At ImageNet's size, with a made-up manifest: costs that are too small to see on digits, in calls, walks and bytes.

A call is of a Python or C function; a walk goes over all row groups, which one call into C can hide.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from ray import cloudpickle

from prelora_ray.bench.rehearsal import SIZES, NoImages, made_up_plan, most_bytes
from prelora_ray.config_file import parse_settings
from prelora_ray.data import stream
from prelora_ray.data.batch import Batch, Pass, StreamPlan
from prelora_ray.data.order import worker_cells
from prelora_ray.data.prepare import plan as plan_tasks
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.sources import Item, Source
from prelora_ray.data.sources.folder import FileReader
from prelora_ray.engine.exchange import ExchangeClock
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.method.phases import Phase
from prelora_ray.train.epoch_meter import EpochMeter
from tests.runs import TINY_VIT

WORLD_SIZE = 8


class RowGroups(tuple[int, ...]):
    """Rows of each row group, with the times that somebody went over all of them."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()


def plan_of(images: int) -> StreamPlan:
    plan = made_up_plan(images, world_size=WORLD_SIZE)
    orders = {split: replace(order, row_groups=RowGroups(order.row_groups)) for split, order in plan.orders.items()}
    for order in orders.values():
        order.row_groups.walks = 0  # the checks of a new order go over them once
    return replace(plan, orders=orders)


def walks(plan: StreamPlan) -> int:
    return cast(RowGroups, plan.orders["train"].row_groups).walks


def calls(function: Callable[[], object]) -> int:
    """Functions that a call of `function` calls, those in C included."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture
def imagenet(monkeypatch: pytest.MonkeyPatch) -> StreamPlan:
    monkeypatch.setattr(stream, "RowReader", NoImages)
    return plan_of(SIZES["imagenet-1k"])


def step(plan: StreamPlan) -> Callable[[], object]:
    """What a step does in the loop's thread before its tensors go to the device."""
    settings = parse_settings(
        {
            "name": "rehearsal",
            "data": {"path": "nowhere", "batch_size": 4096, "cell": 16},
            "model": {"name": "vit_tiny_patch16_224", "image_size": 8, "options": TINY_VIT, "drop_path": 0.2},
            "augment": {"mixup": 0.8, "cutmix": 1.0},
            "method": {"r_max": 8},
        }
    )
    state = TrainState(settings, 1000, plan.orders["train"].num_batches, torch.device("cpu"), world_size=1)
    slots = plan.num_slots
    tensors = {"images": torch.zeros(slots, 8, 8, 3, dtype=torch.uint8), "labels": torch.zeros(slots).long()}
    batch = Batch("train", 0, 0, tensors, np.arange(slots))
    train_step = TrainStep(state, plan)
    return lambda: train_step._inputs(batch)


def end_of_epoch(plan: StreamPlan) -> Callable[[], object]:
    """What is counted at the end of an epoch, with a loop that has taken all batches."""
    state = cast(Any, SimpleNamespace(phases=SimpleNamespace(phase=Phase.FULL), batch=0, device=torch.device("cpu")))
    meter = EpochMeter(state, plan, cast(Any, SimpleNamespace(wait_seconds=0.0)), ExchangeClock(state.device))
    return lambda: meter.end_training(1.0, 1, 1)


@pytest.mark.parametrize("part", [step, end_of_epoch])
def test_it_costs_the_same_with_any_number_of_images(imagenet, part):
    counted = []
    for plan in (plan_of(10_000), imagenet):
        do = part(plan)
        do()  # what is looked up once
        before = walks(plan)
        counted.append(calls(do))
        assert walks(plan) == before
    assert counted[0] == counted[1]


def test_an_epochs_first_block_comes_before_its_slots_are_laid_out(imagenet):
    """Its order has to be drawn whole; all else is for the block alone."""
    order = imagenet.orders["train"]
    blocks = stream._read(imagenet, [Pass("train", epoch) for epoch in range(2)])
    reads = {read: calls(lambda: next(blocks)) for read in ("first", "second")}
    rows = imagenet.batches_per_block(imagenet.rows.row_bytes("train", 0)) * imagenet.num_slots
    assert reads["second"] < 25 * rows
    assert reads["first"] - reads["second"] < 1.5 * len(order.row_groups)
    assert walks(imagenet) <= 2


def test_an_epochs_order_takes_memory_for_a_workers_own_images(imagenet):
    """Twice, as its pieces are put together, and for the row groups of all."""
    order = imagenet.orders["train"]
    own = [worker_cells(rank, 64, order.num_cells) for rank in (0, 63)]
    held = [most_bytes(functools.partial(order.epoch, 0, cells)) for cells in own]
    assert max(held) < 8 * (2 * order.num_rows / 64 + 4 * len(order.row_groups)) + 100_000


def test_what_travels_to_readers_and_decoders_is_small_and_does_not_grow_in_use(imagenet):
    plan = made_up_plan(SIZES["imagenet-1k"])
    passes = [Pass("train", epoch) for epoch in range(300)]
    groups = sum(len(order.row_groups) for order in plan.orders.values())
    assert groups > 42_000
    size = len(pickle.dumps(plan))
    assert size < 8 * groups
    (task,) = stream._Slices(plan, passes).get_read_tasks(1)
    assert len(cloudpickle.dumps(task)) < size + 40 * len(passes)
    next(stream._read(plan, passes))
    assert len(pickle.dumps(plan)) < size + 100


def test_decoders_hold_nothing_that_grows_with_the_images(monkeypatch):
    monkeypatch.setattr(stream.os, "nice", lambda _: 0)
    held = []
    for images in (10_000, SIZES["imagenet-1k"]):
        plan = made_up_plan(images)
        held.append(len(pickle.dumps(vars(stream._Decode(plan.path, plan.rows, plan.num_slots)))))
    assert held[0] == held[1]


def test_a_task_of_prepare_carries_its_own_images_alone():
    sizes = []
    for images in (20_000, 250_000):
        names = [f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i:08d}.JPEG" for i in range(images)]
        items = [Item(name, i % 1000, (name,), stamp="110000-1700000000000000000") for i, name in enumerate(names)]
        classes = tuple(f"n{i:08d}" for i in range(1000))
        source = Source("image folders", FileReader("nowhere"), classes, {"train": items, "val": items[:10_000]}, Counter(), ())
        tasks = plan_tasks(source, "nowhere", PrepareSettings())
        assert sum(len(task.items) for task in tasks) == images + 10_000
        sizes.append([len(cloudpickle.dumps(task)) for task in tasks[::40]])
    small, large = sizes
    assert max(large) < 1.05 * max(small) < 120 * PrepareSettings().shard_rows
