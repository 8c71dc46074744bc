"""Images a second that a worker's reader gets from a bucket which takes its time, and from a disk.

A worker has 4 cells of 16 of each batch, as one of 64 workers has of 4096 images. All files have the same images, and
no image is decoded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
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
    """What the bucket of one row allows."""
    workers: int = 16
    """Of the row in which the worker is one of several, with as many images for each. It opens more files for what it
    reads: with the defaults 0.8 files for each row group, as one of 64 does in the first epoch of ImageNet-1k."""


def bench_reading(options: Options) -> dict[str, Any]:
    """An epoch of each way; a bucket's requests are counted, and `peak_bytes` is the most that Arrow held as a
    block was done."""
    seconds = options.latency / 1000
    far = partial(bucket, latency=seconds)
    ways: list[tuple[str, Way, int, int]] = [
        ("a disk", _disk, READS, 1),
        ("a bucket without delay", partial(bucket, latency=0), READS, 1),
        (f"a bucket, {options.latency:g} ms a request", far, READS, 1),
        ("the same, one row group at a time", far, 1, 1),
        (
            f"the same, at most {options.requests_per_second:g} requests a second",
            partial(far, requests_per_second=options.requests_per_second),
            READS,
            1,
        ),
        (f"a bucket, {options.latency:g} ms a request, one of {options.workers} workers", far, READS, options.workers),
    ]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows = [
            {"name": name, **_measure(folder, _write_shards(folder, options.images * workers), way, num_reads, workers)}
            for name, way, num_reads, workers in ways
        ]
    return {"benchmark": "reading", **describe(torch.device("cpu")), "options": vars(options), "rows": rows}


def _write_shards(folder: Path, images: int) -> tuple[Shard, ...]:
    """Files of so many images; those of one length are links to one, so that they take little of the disk."""
    noise, shards = np.random.default_rng(0).bytes(2 * _IMAGE_BYTES), []
    for number, first in enumerate(range(0, images, _SHARD_ROWS)):
        rows = min(_SHARD_ROWS, images - first)
        written, path = folder / f"of-{rows}", folder / f"train-{number:05d}.parquet"
        if not written.exists():
            content = [noise[i : i + _IMAGE_BYTES] for i in range(rows)]
            columns = {"image": content, "label": [0] * rows, "source": [f"train/n01440764/{i}.JPEG" for i in range(rows)]}
            pq.write_table(pa.table(columns), written, row_group_size=_GROUP_ROWS, compression="none", use_dictionary=False)
        path.unlink(missing_ok=True)
        path.hardlink_to(written)
        groups = tuple(min(_GROUP_ROWS, rows - i) for i in range(0, rows, _GROUP_ROWS))
        shards.append(Shard(path.name, groups, path.stat().st_size, ""))
    return tuple(shards)


def _disk(folder: Path) -> AbstractContextManager[Bucket]:
    return nullcontext(Bucket(str(folder), (0, 0, 0)))


def _measure(folder: Path, shards: tuple[Shard, ...], way: Way, num_reads: int, workers: int) -> dict[str, Any]:
    plan = _plan(shards, workers)
    order = plan.orders["train"]
    ids = order.epoch(0, plan.cells)
    batches = range(0, order.num_batches, _BLOCK_BATCHES)
    blocks = (
        np.concatenate([order.slots(ids, batch + i, plan.cells, plan.num_slots) for i in range(_BLOCK_BATCHES)])
        for batch in batches
    )
    own = ids[ids >= 0]
    groups = len(np.unique(np.searchsorted(np.cumsum(order.row_groups), own, side="right")))
    with way(folder) as place:
        reader = RowReader(place.uri, shards, COLUMNS, num_reads)
        before, held = pa.total_allocated_bytes(), []
        start = time.perf_counter()
        for _ in reader.read_blocks((block[block >= 0] for block in blocks), ids):
            held.append(pa.total_allocated_bytes() - before)
        seconds = time.perf_counter() - start
    return {
        "images_per_second": len(own) / seconds,
        "requests_per_row_group": place.requests / groups,
        "refused_per_row_group": place.refused / groups,
        "peak_bytes": max(held),
    }


def _plan(shards: tuple[Shard, ...], workers: int) -> StreamPlan:
    manifest = Manifest(("a", "b"), {"train": shards, "val": shards[:1]}, 0, {})
    settings = parse_settings({"name": "bench", "data": {"path": "bench", "batch_size": 64 * workers, "cell": 16}})
    return stream_plan(settings, manifest, 0, workers)
