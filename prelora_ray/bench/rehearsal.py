"""What the number of images of a data set costs, apart from reading them, with a made-up manifest.

In training, what one of 8 workers does, with the batch and cells of `jobs/configs/imagenet_vit_large.yaml`. No image is
read or decoded: every row group comes back empty. A part is a function from a number of images to what it measured.
"""

from __future__ import annotations

import pickle
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from ray import cloudpickle

from prelora_ray.bench.machine import describe
from prelora_ray.config_file import parse_settings
from prelora_ray.data import stream
from prelora_ray.data.batch import Pass, StreamPlan
from prelora_ray.data.manifest import Manifest, Shard, Split
from prelora_ray.data.prepare import plan as plan_tasks
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.sources import Columns, Splits
from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.folder import open_folders
from prelora_ray.train.batch_stream import stream_plan

SIZES = {"imagenet-1k": 1_281_167, "imagenet-21k": 14_197_122}
"""Training images."""


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


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call, which depends little on what else the machine does."""
    start = time.process_time()
    call()
    return time.process_time() - start


def step(images: int) -> dict[str, Any]:
    """What the loop's thread asks of the order at each step."""
    train = made_up_plan(images).orders["train"]
    return {"seconds": statistics.median(seconds(lambda: train.batch_size(7)) for _ in range(5))}


def epoch_end(images: int) -> dict[str, Any]:
    """Counting the images of an epoch, while GPUs wait."""
    train = made_up_plan(images).orders["train"]
    return {"seconds": seconds(lambda: train.rows_from(0))}


def before_epoch(images: int) -> dict[str, Any]:
    """The reader's way to its first block, and through the whole epoch."""
    blocks = stream._read(made_up_plan(images), [Pass("train", 0)])
    first = seconds(lambda: next(blocks))
    return {"seconds_to_the_first_block": first, "seconds_for_the_epoch": first + seconds(lambda: list(blocks))}


def order(images: int) -> dict[str, Any]:
    """Drawing an epoch's order, by the last of 8 workers, whom it takes longest."""
    plan = made_up_plan(images, rank=7)

    def draw() -> object:
        return plan.orders["train"].epoch(0, plan.cells)

    return {"seconds": seconds(draw), "bytes": most_bytes(draw)}


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
    reading = seconds(lambda: found.append(open_folders("nowhere", files, Splits(), Columns())))
    planning = seconds(lambda: found.append(plan_tasks(found[0], "nowhere", PrepareSettings())))
    sizes = [len(cloudpickle.dumps(task)) for task in found[1]]
    return {
        "seconds_of_reading_names": reading,
        "seconds_of_planning": planning,
        "tasks": len(sizes),
        "bytes": sum(sizes),
        "bytes_of_a_task": max(sizes),
    }


_PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "step": step,
    "epoch_end": epoch_end,
    "before_epoch": before_epoch,
    "order": order,
    "plan": plan,
    "prepare": prepare,
}


def bench_rehearsal() -> dict[str, Any]:
    """Seconds of processor time and bytes for ImageNet-1k and 21k; each row is one figure of one part at one size."""
    stream.RowReader = NoImages  # type: ignore[misc]  # for the rest of this process
    rows = [
        {"name": f"{part}, {name}", "images": images, "measured": measured, "value": value}
        for part, measure in _PARTS.items()
        for name, images in SIZES.items()
        for measured, value in measure(images).items()
    ]
    return {"benchmark": "rehearsal", **describe(torch.device("cpu")), "rows": rows}
