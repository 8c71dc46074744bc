"""The stream of a run's batches, as the loop takes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import ray
import torch

from prelora_ray.config import Settings
from prelora_ray.data.batch import Batch, Pass, StreamPlan
from prelora_ray.data.manifest import Manifest, Split
from prelora_ray.data.order import Order, first_rows
from prelora_ray.data.stream import stream_batches
from prelora_ray.tasks.chosen import TASKS


class BatchStream:
    """The stream of batches, taken split by split, with the time that was spent waiting for it."""

    def __init__(
        self,
        settings: Settings,
        plan: StreamPlan,
        start: tuple[int, int],
        workers_on_node: int,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """`start`: position, (epochs done, batches done in the next epoch). `on_batch` is called after each batch."""
        self._on_batch = on_batch
        self._batches = stream_batches(plan, _passes(settings, *start), _decoders(settings, workers_on_node))
        self._next: Batch | None = None
        self.wait_seconds = 0.0

    def take(self, split: Split, epoch: int) -> Iterator[Batch]:
        """The batches that come next, as long as they are of this split and epoch."""
        while True:
            if self._next is None:
                start = time.monotonic()
                self._next = next(self._batches, None)
                self.wait_seconds += time.monotonic() - start
            batch = self._next
            if batch is None or (batch.split, batch.epoch) != (split, epoch):
                return
            self._next = None
            yield batch
            self._on_batch()


def validates(settings: Settings, epoch: int) -> bool:
    """Whether an epoch (from 0) ends with a validation."""
    return (epoch + 1) % settings.train.validate_every == 0 or epoch + 1 == settings.train.epochs


def _passes(settings: Settings, first_epoch: int, first_batch: int) -> list[Pass]:
    """The run from a position on: each epoch's training images, and behind them its validation."""
    passes = []
    for epoch in range(first_epoch, settings.train.epochs):
        passes.append(Pass("train", epoch, first_batch if epoch == first_epoch else 0))
        if validates(settings, epoch):
            passes.append(Pass("val", epoch))
    return passes


def stream_plan(settings: Settings, manifest: Manifest, rank: int, world_size: int) -> StreamPlan:
    """What a worker streams, as the settings describe it."""
    data, seed = settings.data, settings.train.seed
    groups: dict[Split, tuple[int, ...]] = {split: manifest.row_groups(split) for split in ("train", "val")}
    if data.max_batches is not None:
        groups = {split: first_rows(rows, data.max_batches * data.batch_size) for split, rows in groups.items()}
    orders: dict[Split, Order] = {
        "train": Order(groups["train"], data.num_cells, data.cell, seed, data.shuffle_row_groups),
        "val": Order(groups["val"], data.num_cells, data.cell, None),
    }
    rows = TASKS[settings.task].rows(settings, manifest)
    return StreamPlan(data.path, manifest, orders, rows, rank, world_size)


def _decoders(settings: Settings, workers_on_node: int) -> int:
    if settings.data.decoders != "auto":
        return settings.data.decoders
    here = ray.get_runtime_context().get_node_id()
    has = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return share_of_decoders(has.get("CPU", 1), has.get("GPU", 0) if torch.cuda.is_available() else 0, workers_on_node)


def share_of_decoders(cpus: float, gpus: float, workers_on_node: int) -> int:
    """Decoders of one worker on a node: its share of the CPUs, less one that a worker on a GPU needs for itself.

    A worker on a GPU shares with as many as the node has GPUs, as other runs may be on them, such as a sweep's trials.
    """
    return max(1, int(cpus // max(workers_on_node, gpus)) - int(gpus > 0))
