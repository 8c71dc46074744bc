"""Ray Data: read, decode, augment and batch, in the order that `order.py` lays down.

Each worker builds one pipeline per attempt, from its position to the end of the run: one lazy read
task walks the order and yields the stored rows of this worker's slice of each global batch, a pool
of decoder actors on the worker's node turns them into what a model takes (`StreamPlan.rows`). With a single
read task, Ray Data's `preserve_order` keeps the batches in order; resuming skips by arithmetic and decodes nothing.
Validation batches travel in the same pipeline, after the training batches of their epoch, so an
epoch boundary starts nothing anew.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata

from prelora_ray.data.batch import Batch, Pass, Rows, StreamPlan
from prelora_ray.data.damage import DamagedDataError, UndecodableError, damaged_image
from prelora_ray.data.manifest import Split, parse_manifest
from prelora_ray.data.order import Ids
from prelora_ray.data.rows import RowReader
from prelora_ray.storage import Storage

if TYPE_CHECKING:
    import torch

_LEAST_STORE_BYTES = 256 * 2**20
_RELEASE_SECONDS = 5.0
_OF_BLOCK = {"is_train", "epoch", "first_batch", "ids", "slots"}
"""Columns of a block that are not the rows'."""


def stream_batches(plan: StreamPlan, schedule: Sequence[Pass], decoders: int) -> Iterator[Batch]:
    """Yields this worker's batches of every pass in turn, decoded by `decoders` processes.

    Runs inside a Ray Train worker, or anywhere where Ray is up. Raises DamagedDataError where what was read is not what
    was prepared; any other error may pass.
    """
    context = quiet_data_context()
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=_store_bytes(plan, decoders))
    context.op_resource_reservation_ratio = 1.0  # half for the reader, half for the decoders: neither takes the other's
    context.downstream_capacity_backpressure_ratio = None  # it would idle decoders whose blocks are not asked for yet
    # While the decoders have no room, Ray Data still lets the reader go on: seldom, or it reads the whole run ahead.
    context.output_backpressure_guard_release_interval_s = _RELEASE_SECONDS
    # Ray Data fetches from the reader a few times a second: two blocks a time, its default, are few for many decoders.
    context._max_num_blocks_in_streaming_gen_buffer = decoders + 2
    context.target_max_block_size = 1  # one yielded row is one block; None would buffer the whole stream
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    dataset = ray.data.read_datasource(
        _Slices(plan, schedule),
        override_num_blocks=1,
        concurrency=1,
        num_cpus=0,
        memory=1,  # other resources than the decoders', or Ray Data would fuse the two into one process
        label_selector=here,
    )
    dataset = dataset.map_batches(
        cast(Any, _Decode),
        fn_constructor_args=(plan.path, plan.rows, plan.num_slots),  # they hold no manifest, which grows with the images
        batch_size=None,
        batch_format="pyarrow",
        concurrency=decoders,
        num_cpus=0,  # Ray Train may hold every CPU of the node, and a task that waits for one never runs
        label_selector=here,
    )
    for block in dataset.iter_torch_batches(batch_size=None, prefetch_batches=2, device="cpu"):
        block = {name: cast("torch.Tensor", column)[0] for name, column in block.items()}
        if "damage" in block:
            raise DamagedDataError(block["damage"].numpy().tobytes().decode())
        split: Split = "train" if block["is_train"] else "val"
        for i in range(len(block["ids"])):
            ids = block["ids"][i].numpy()
            batch = int(block["first_batch"]) + i
            tensors = {name: column[i] for name, column in block.items() if name not in _OF_BLOCK}
            yield Batch(split, int(block["epoch"]), batch, tensors, ids)


def _store_bytes(plan: StreamPlan, decoders: int) -> int:
    """Object store for the encoded and decoded blocks on their way.

    Of the decoders' half, Ray Data keeps one half for running tasks and one for blocks that wait. With twice a block
    for each decoder in either, no decoder waits for room.
    """
    block = max(plan.batches_per_block(size) * plan.num_slots * size for size in plan.rows.all_row_bytes)
    return max(_LEAST_STORE_BYTES, 8 * decoders * block)


def quiet_data_context() -> ray.data.DataContext:
    """This process's settings of Ray Data, with its progress bars and messages off."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


class _Slices(ray.data.Datasource):
    """This worker's slice of every global batch, as it is stored: one lazy read task, one row a block."""

    def __init__(self, plan: StreamPlan, schedule: Sequence[Pass]) -> None:
        self._plan = plan
        self._schedule = schedule

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, **_: Any) -> list[ray.data.ReadTask]:
        plan, schedule = self._plan, self._schedule
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(lambda: _read(plan, schedule), metadata)]


def _read(plan: StreamPlan, schedule: Sequence[Pass]) -> Iterator[pa.Table]:
    try:
        yield from _read_slices(plan, schedule)
    except DamagedDataError as damage:  # travels as a block, as Ray Data would wrap what is raised in errors of its own
        yield pa.table({"damage": [str(damage)]})


def _read_slices(plan: StreamPlan, schedule: Sequence[Pass]) -> Iterator[pa.Table]:
    readers = {split: RowReader(plan.path, plan.manifest.splits[split], plan.rows.columns) for split in plan.orders}
    for pass_ in schedule:
        split, epoch, first_batch = pass_
        ids = plan.orders[split].epoch(epoch, plan.cells)
        blocks, to_read = itertools.tee(_blocks(plan, pass_, ids))
        columns_of_blocks = readers[split].read_blocks(
            (slots[slots >= 0] for _, slots in to_read), plan.orders[split].ids_from(ids, first_batch, plan.cells)
        )
        for (first, slots), columns in zip(blocks, columns_of_blocks, strict=True):
            yield pa.table(
                {
                    "is_train": [split == "train"],
                    "epoch": [epoch],
                    "first_batch": [first],
                    "slots": pa.array([slots.ravel()], pa.list_(pa.int64())),
                    **{name: pa.LargeListArray.from_arrays([0, len(column)], column) for name, column in columns.items()},
                }
            )


def _blocks(plan: StreamPlan, pass_: Pass, ids: Ids) -> Iterator[tuple[int, Ids]]:
    """The first batch of each block, and its slots, (batches, num_slots); `ids` is the order of the epoch."""
    order = plan.orders[pass_.split]
    batches_per_block = plan.batches_per_block(plan.rows.row_bytes(pass_.split, pass_.epoch))
    for first in range(pass_.first_batch, order.num_batches, batches_per_block):
        batches = range(first, min(first + batches_per_block, order.num_batches))
        yield first, np.stack([order.slots(ids, batch, plan.cells, plan.num_slots) for batch in batches])


class _Decode:
    """Stored rows of one block to padded arrays."""

    def __init__(self, path: str, rows: Rows, num_slots: int) -> None:
        os.nice(10)  # a training loop on the same cores goes first; decoding takes what it leaves
        self._decode = rows.decoder()
        self._path = path
        self._columns = rows.columns
        self._num_slots = num_slots

    def __call__(self, block: pa.Table) -> dict[str, Any]:
        try:
            if "damage" in block.column_names:
                raise DamagedDataError(block["damage"][0].as_py())
            return self._decoded(block)
        except DamagedDataError as damage:
            return {"damage": np.frombuffer(str(damage).encode(), np.uint8)[np.newaxis]}

    def _decoded(self, block: pa.Table) -> dict[str, Any]:
        is_train, epoch = block["is_train"][0].as_py(), block["epoch"][0].as_py()
        split: Split = "train" if is_train else "val"
        ids = block["slots"].combine_chunks().flatten().to_numpy()
        columns = {name: block[name].combine_chunks().flatten() for name in self._columns}
        try:
            arrays = self._decode(split, epoch, ids, columns)
        except UndecodableError as error:
            folder = Storage(self._path)
            raise damaged_image(folder, parse_manifest(folder).splits[split], error.sample, str(error)) from None
        batches = {name: array.reshape(1, -1, self._num_slots, *array.shape[1:]) for name, array in arrays.items()}
        return {
            "is_train": np.array([is_train]),
            "epoch": np.array([epoch]),
            "first_batch": np.array([block["first_batch"][0].as_py()]),
            "ids": ids.reshape(1, -1, self._num_slots),
            **batches,
        }
