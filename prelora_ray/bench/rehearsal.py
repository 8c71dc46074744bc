"""What the number of images of a data set costs, apart from reading them, with a made-up manifest.

In training, what one of 8 workers does, or the last of other numbers of workers, with the batch and cells of
`jobs/configs/imagenet_vit_large.yaml`. No image is read or decoded: every row group comes back empty. A part is a
function from a number of images to what it measured.
"""

from __future__ import annotations

import functools
import pickle
import statistics
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray import cloudpickle

from prelora_ray.bench.machine import cpu_time_of, describe
from prelora_ray.config_file import parse_settings
from prelora_ray.data import stream
from prelora_ray.data.batch import Pass, StreamPlan
from prelora_ray.data.manifest import Manifest, Shard, Split
from prelora_ray.data.prepare import plan as plan_tasks
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.rows import AHEAD
from prelora_ray.data.sources import Columns, Splits
from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.folder import open_folders
from prelora_ray.train.batch_stream import stream_plan

SIZES = {"imagenet-1k": 1_281_167, "imagenet-21k": 14_197_122}
"""Training images."""
_LARGE_SIZES = {**SIZES, "400 million": 400_000_000}
_WORKERS = (1, 8, 64)
_MOST_IMAGES = 2 * 10**7
"""Of one worker: for more it would take minutes and gigabytes to measure what they take."""


def made_up_plan(images: int, rank: int = 0, world_size: int = 8) -> StreamPlan:
    """What a worker streams of so many images, prepared as by default: 2048 in a file, about 1 MiB in a row group."""
    splits: dict[Split, tuple[Shard, ...]] = {"train": _shards("train", images), "val": _shards("val", 50_000)}
    manifest = Manifest(tuple(f"class {i}" for i in range(1000)), splits, 0, {})
    settings = parse_settings({"name": "rehearsal", "data": {"path": "nowhere", "batch_size": 4096, "cell": 16}})
    return stream_plan(settings, manifest, rank, world_size)


def _shards(split: str, images: int, rows: int = 2048, group: int = 31) -> tuple[Shard, ...]:
    shards = []
    for first in range(0, images, rows):
        here = min(rows, images - first)
        groups = (group,) * (here // group) + ((here % group,) if here % group else ())
        shards.append(Shard(f"{split}-{first // rows:05d}.parquet", groups, 2**26, f"{first:064x}"))
    return tuple(shards)


class NoImages(stream.RowReader):
    """Row groups of rows that hold nothing."""

    def _read(self, group: int) -> dict[str, pa.Array]:
        rows = int(self._start[group + 1] - self._start[group])
        return {"image": pa.array([b""] * rows, pa.large_binary()), "label": pa.array([0] * rows, pa.int64())}


def step(images: int) -> dict[str, Any]:
    """What the loop's thread asks of the order at each step."""
    train = made_up_plan(images).orders["train"]
    return {"seconds": statistics.median(cpu_time_of(lambda: train.batch_size(7)) for _ in range(5))}


def epoch_end(images: int) -> dict[str, Any]:
    """Counting the images of an epoch, while GPUs wait."""
    train = made_up_plan(images).orders["train"]
    return {"seconds": cpu_time_of(lambda: train.rows_from(0))}


def before_epoch(images: int) -> dict[str, Any]:
    """The reader's way to its first block, and through the whole epoch."""
    blocks = stream._read(made_up_plan(images), [Pass("train", 0)])
    first = cpu_time_of(lambda: next(blocks))
    return {"seconds_to_the_first_block": first, "seconds_for_the_epoch": first + cpu_time_of(lambda: list(blocks))}


def order(images: int, workers: int) -> dict[str, Any]:
    """Drawing an epoch's order, by the last of the workers, whom it takes longest."""
    plan = made_up_plan(images, workers - 1, workers)

    def draw() -> object:
        return plan.orders["train"].epoch(0, plan.cells)

    return {"seconds": cpu_time_of(draw), "bytes": most_bytes(draw)}


def reader(images: int, workers: int) -> dict[str, Any]:
    """Row groups that a reader holds at most in an epoch, and those that the last worker reads of those of all."""
    plan = made_up_plan(images, workers - 1, workers)
    of_rows, in_use = row_groups_in_use(plan)
    return {"row_groups_held": in_use + AHEAD, "share_read": of_rows / len(plan.orders["train"].row_groups)}


def row_groups_in_use(plan: StreamPlan) -> tuple[int, int]:
    """Row groups that a worker needs in an epoch of training, and the most at a time: of which it has taken rows, or is
    about to, and has more to take."""
    order, cells = plan.orders["train"], plan.cells
    a_block = order.cell * plan.batches_per_block(plan.rows.row_bytes("train", 0))
    rows_of_streams = np.diff([cell * order.num_rows // order.num_cells for cell in (*cells, cells[-1] + 1)])
    blocks = np.concatenate([np.arange(rows, dtype=np.int32) // a_block for rows in rows_of_streams])
    groups = np.searchsorted(np.cumsum(order.row_groups), order.epoch(0, cells), "right")
    first, last = np.full(len(order.row_groups), len(blocks)), np.full(len(order.row_groups), -1)
    np.minimum.at(first, groups, blocks)
    np.maximum.at(last, groups, blocks)
    used = last >= 0
    begun, ended = (np.bincount(at, minlength=blocks.max() + 2) for at in (first[used], last[used] + 1))
    return int(used.sum()), int(np.cumsum(begun - ended).max())


def most_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call holds at a time, beyond what there was before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def plan(images: int) -> dict[str, Any]:
    """What is sent to the reader and to every decoder."""
    return {"bytes": len(pickle.dumps(made_up_plan(images)))}


def made_up_source(images: int) -> list[File]:
    """What a listing of ImageNet's folders finds, with so many training images."""
    files = [File(f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG", "110000-1700000000000000000") for i in range(images)]
    val = [File(f"val/n{i % 1000:08d}/val_{i:08d}.JPEG", "110000-1700000000000000000") for i in range(50_000)]
    return sorted(files + val, key=lambda file: file.path)


def prepare(images: int) -> dict[str, Any]:
    """`prelora prepare` before its first shard: classes and splits from file names, and what is sent to each task."""
    files = made_up_source(images)
    found: list[Any] = []
    reading = cpu_time_of(lambda: found.append(open_folders("nowhere", files, Splits(), Columns())))
    planning = cpu_time_of(lambda: found.append(plan_tasks(found[0], "nowhere", PrepareSettings())))
    sizes = [len(cloudpickle.dumps(task)) for task in found[1]]
    return {
        "seconds_of_reading_names": reading,
        "seconds_of_planning": planning,
        "tasks": len(sizes),
        "bytes": sum(sizes),
        "bytes_of_a_task": max(sizes),
    }


_PARTS: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, int]]] = {
    "step": (step, _LARGE_SIZES),
    "epoch_end": (epoch_end, _LARGE_SIZES),
    "before_epoch": (before_epoch, SIZES),
    "plan": (plan, _LARGE_SIZES),
    "prepare": (prepare, SIZES),
}
_PARTS_OF_WORKERS: dict[str, Callable[..., dict[str, Any]]] = {"order": order, "reader": reader}


def bench_rehearsal() -> dict[str, Any]:
    """Seconds of processor time, bytes and row groups by number of images, and of workers where it depends on these;
    each row is one figure of one part."""
    stream.RowReader = NoImages  # type: ignore[misc]  # for the rest of this process
    rows = [row for part, (measure, sizes) in _PARTS.items() for row in _rows(part, measure, sizes, 8)]
    for workers in _WORKERS:
        sizes = {name: images for name, images in _LARGE_SIZES.items() if images // workers <= _MOST_IMAGES}
        for part, measure_of in _PARTS_OF_WORKERS.items():
            rows += _rows(part, functools.partial(measure_of, workers=workers), sizes, workers)
    return {"benchmark": "rehearsal", **describe(torch.device("cpu")), "rows": rows}


def _rows(part: str, measure: Callable[[int], dict[str, Any]], sizes: dict[str, int], workers: int) -> Iterator[dict[str, Any]]:
    for name, images in sizes.items():
        for measured, value in measure(images).items():
            yield {"name": f"{part}, {name}", "images": images, "workers": workers, "measured": measured, "value": value}
