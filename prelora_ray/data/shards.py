"""A prepared folder as tasks make it, each of them one shard, on all CPUs of a Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
import ray.data

from prelora_ray.data.manifest import is_prepared
from prelora_ray.data.prepare_settings import NAMED_SOURCES
from prelora_ray.data.sources.source import Item
from prelora_ray.data.stream import quiet_data_context
from prelora_ray.errors import UserError, WorkError
from prelora_ray.storage import Storage

PARTS = "parts"
"""The folder of the notes beside shards."""
_SHARDS_PER_BUFFER = 8
Written = TypeVar("Written", covariant=True)


class PrepareError(WorkError):
    """The source could be read, but too much of it is unusable."""


class Task(Protocol[Written]):
    @property
    def items(self) -> Sequence[Item]: ...
    def run(self) -> Written:
        """Writes the shard, unless it is there already, made from the same items with the same settings."""


def run_tasks(tasks: Sequence[Task[Written]], on_progress: Callable[[int, int], None]) -> list[Written]:
    """Runs all tasks on Ray's CPUs; returns what each has written, in their order."""
    quiet_data_context()
    references = [ray.put(task) for task in tasks]
    sizes = [len(task.items) for task in tasks]
    written: dict[int, Written] = {}
    done = 0
    shards = ray.data.range(len(tasks), override_num_blocks=len(tasks))
    run: Callable[[dict[str, Any]], dict[str, Any]]
    run = lambda row: {"id": row["id"], "written": ray.get(references[row["id"]]).run()}  # noqa: E731
    for row in shards.map(run).iter_rows():
        written[row["id"]] = row["written"]
        done += sizes[row["id"]]
        on_progress(done, sum(sizes))
    return [written[i] for i in range(len(tasks))]


def shuffled(items: list[Item], rng: np.random.Generator, of_shard: int) -> list[Item]:
    """Items in random order. Those of a source that is read in blocks are shuffled inside a buffer of random blocks,
    so that a shard, of `of_shard` items, needs few of them: a block is read some `_SHARDS_PER_BUFFER` times and not
    once a shard."""
    blocks: dict[int, list[Item]] = {}
    for item in items:
        blocks.setdefault(-1 if item.block is None else item.block, []).append(item)
    shuffled: list[Item] = []
    buffer: list[Item] = []
    order = [list(blocks.values())[i] for i in rng.permutation(len(blocks))]
    for i, block in enumerate(order):
        buffer += block
        if i + 1 == len(order) or len(buffer) >= _SHARDS_PER_BUFFER * of_shard:
            shuffled += [buffer[j] for j in rng.permutation(len(buffer))]
            buffer = []
    return shuffled


def check_is_ours(folder: Storage, source: str) -> None:
    """Raises UserError for an output folder that holds anything but what an earlier `prepare` has written."""
    if source not in NAMED_SOURCES and os.path.realpath(Storage(source).path) == os.path.realpath(folder.path):
        raise UserError(f"{folder.uri!r} is the source itself: give another folder for what is prepared")
    files = [name for name in (*folder.list_files(), *folder.list_folders()) if not name.startswith(".")]
    if files and PARTS not in folder.list_folders() and not is_prepared(folder):
        raise UserError(f"{folder.uri!r} holds {files[0]!r}: give a new folder, or one that `prepare` has written")


def remove_stale(folder: Storage, files: set[str]) -> None:
    """Removes what an earlier job with other settings has left: all that has a note, but for `files`."""
    kept = {part_of(file) for file in files}
    for part in (folder / PARTS).list_files():
        if part not in kept:
            file = part.removesuffix(".json")
            folder.remove_file(file if "." in file else f"{file}.parquet")
            (folder / PARTS).remove_file(part)


def part_of(shard: str) -> str:
    """Name of the note beside a file of what it was made from."""
    return shard.removesuffix(".parquet") + ".json"
