"""A prepared folder against its manifest, byte for byte and image by image. Needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prelora_ray.data.augment import undecodable
from prelora_ray.data.damage import DamagedDataError, check_shard, damaged_row
from prelora_ray.data.manifest import Manifest, Shard, parse_manifest
from prelora_ray.errors import one_line
from prelora_ray.storage import Storage
from prelora_ray.words import counted


def check_prepared(folder: Storage, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What is wrong with a prepared folder, a sentence each: shards that are not what the manifest says, and rows whose
    image cannot be decoded, or whose label or token is none of the manifest's.

    `on_progress` is called with the shards done and their total. Raises UserError where there is no readable manifest.
    """
    manifest = parse_manifest(folder)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    findings: list[str] = []
    # Threads suffice: hashing and decoding release Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda shard: list(_check_shard(folder, shard, manifest)), shards)
        for done, of_shard in enumerate(found, 1):
            findings += of_shard
            on_progress(done, len(shards))
    return findings


def _check_shard(folder: Storage, shard: Shard, manifest: Manifest) -> Iterator[str]:
    num_classes = len(manifest.classes)
    name = f"{folder}/{shard.file}"
    try:
        content = folder.read_bytes(shard.file)
    except OSError as error:
        yield f"{name} cannot be read: {one_line(error)}"
        return
    try:
        check_shard(folder, shard, content)
    except DamagedDataError as error:
        yield str(error)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        table = file.read()
    except (OSError, pa.ArrowException) as error:
        yield f"{name} is no whole Parquet file: {one_line(error)}"
        return
    if groups != shard.row_groups:
        yield f"{name} has row groups of {groups} rows, and its manifest says {shard.row_groups}"
    if manifest.text is not None:
        largest = pc.max(pc.list_flatten(table["tokens"])).as_py()  # None without a sequence
        if largest is not None and largest >= num_classes:
            yield f"{name} has token {largest}, and there are {counted(num_classes, 'token')}"
        return
    for i, row in enumerate(table.to_pylist()):
        image, label, source = row.get("image"), row.get("label"), row.get("source")
        if (reason := undecodable(image or b"")) is not None:
            yield str(damaged_row(folder, shard.file, i, source, reason))
        if not isinstance(label, int) or not 0 <= label < num_classes:
            yield f"{name}, row {i} ({source}): its label is {label}, and there are {counted(num_classes, 'class', 'classes')}"
