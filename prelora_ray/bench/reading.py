"""Images a second that a worker's reader gets from a bucket which takes its time, and from a disk.

A batch has 4 cells of 16, as that of one of 64 workers has of 4096 images; the data set is small, and is read whole. No
image is decoded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from prelora_ray.bench.bucket import Bucket, bucket
from prelora_ray.bench.machine import describe
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import StreamPlan
from prelora_ray.data.image_rows import COLUMNS
from prelora_ray.data.manifest import Manifest, Shard
from prelora_ray.data.rows import READS, RowReader
from prelora_ray.train.batch_stream import stream_plan

_GROUP_ROWS, _IMAGE_BYTES = 31, 34_000
"""As `prelora prepare` makes them of ImageNet by default."""
_SHARD_ROWS = 256
"""An eighth of that, so that there are more files than are kept open on a disk."""
_BLOCK_BATCHES = 2
Way = Callable[[Path], AbstractContextManager[Bucket]]
"""Where the files of a folder are read from."""


@dataclass(frozen=True)
class Options:
    images: int = 16_384
    latency: float = 20.0
    """Milliseconds of a request."""
    requests_per_second: float = 100.0
    """What the bucket of the last row allows."""


def bench_reading(options: Options) -> dict[str, Any]:
    """An epoch of each way; a bucket's requests are counted, and `peak_bytes` is the most that Arrow held as a
    block was done."""
    seconds = options.latency / 1000
    ways: list[tuple[str, Way, int]] = [
        ("a disk", _disk, READS),
        ("a bucket without delay", lambda folder: bucket(folder, 0), READS),
        (f"a bucket, {options.latency:g} ms a request", lambda folder: bucket(folder, seconds), READS),
        ("the same, one row group at a time", lambda folder: bucket(folder, seconds), 1),
        (
            f"the same, at most {options.requests_per_second:g} requests a second",
            lambda folder: bucket(folder, seconds, options.requests_per_second),
            READS,
        ),
    ]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        shards = _write_shards(folder, options.images)
        rows = [{"name": name, **_measure(folder, way, shards, num_reads)} for name, way, num_reads in ways]
    return {"benchmark": "reading", **describe(torch.device("cpu")), "options": vars(options), "rows": rows}


def _write_shards(folder: Path, images: int) -> tuple[Shard, ...]:
    noise, shards = np.random.default_rng(0).bytes(2 * _IMAGE_BYTES), []
    for first in range(0, images, _SHARD_ROWS):
        rows = min(_SHARD_ROWS, images - first)
        content = [noise[i : i + _IMAGE_BYTES] for i in range(rows)]
        columns = {"image": content, "label": [0] * rows, "source": [f"train/n01440764/{first + i}.JPEG" for i in range(rows)]}
        file = f"train-{first // _SHARD_ROWS:05d}.parquet"
        pq.write_table(pa.table(columns), folder / file, row_group_size=_GROUP_ROWS, compression="none", use_dictionary=False)
        groups = tuple(min(_GROUP_ROWS, rows - i) for i in range(0, rows, _GROUP_ROWS))
        shards.append(Shard(file, groups, (folder / file).stat().st_size, ""))
    return tuple(shards)


def _disk(folder: Path) -> AbstractContextManager[Bucket]:
    return nullcontext(Bucket(str(folder), (0, 0, 0)))


def _measure(folder: Path, way: Way, shards: tuple[Shard, ...], num_reads: int) -> dict[str, Any]:
    plan = _plan(shards)
    order = plan.orders["train"]
    ids = order.epoch(0, plan.cells)
    batches = range(0, order.num_batches, _BLOCK_BATCHES)
    blocks = (
        np.concatenate([order.slots(ids, batch + i, plan.cells, plan.num_slots) for i in range(_BLOCK_BATCHES)])
        for batch in batches
    )
    with way(folder) as place:
        reader = RowReader(place.uri, shards, COLUMNS, num_reads)
        before, held = pa.total_allocated_bytes(), []
        start = time.perf_counter()
        for _ in reader.read_blocks((block[block >= 0] for block in blocks), ids):
            held.append(pa.total_allocated_bytes() - before)
        seconds = time.perf_counter() - start
    return {
        "images_per_second": order.num_rows / seconds,
        "requests_per_row_group": place.requests / len(order.row_groups),
        "refused_per_row_group": place.refused / len(order.row_groups),
        "peak_bytes": max(held),
    }


def _plan(shards: tuple[Shard, ...]) -> StreamPlan:
    manifest = Manifest(("a", "b"), {"train": shards, "val": shards[:1]}, 0, {})
    settings = parse_settings({"name": "bench", "data": {"path": "bench", "batch_size": 64, "cell": 16}})
    return stream_plan(settings, manifest, rank=0, world_size=1)
