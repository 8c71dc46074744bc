"""Which sample comes when, in which batch, on which worker. Arithmetic, no I/O.

A global batch of G samples is made of C cells of G / C samples, which are never split between
workers or micro-batches. An epoch's order is a seeded permutation of the row groups, with the rows
shuffled inside a buffer of consecutive row groups; it is cut into C streams whose lengths differ by at
most one row, and cell j of batch b is the rows ``b * cell`` to ``(b + 1) * cell`` of stream j. So the
samples of a batch follow from (seed, epoch, batch), every sample comes once an epoch, and any
number of workers up to C can serve a batch: worker r of W serves cells ``r C / W`` to ``(r + 1) C / W``
(rounded down). The idea is Mosaic Streaming's elastic determinism.

A larger buffer shuffles better and holds more encoded bytes: a worker keeps up to twice (streams it serves) x (row
groups in a buffer) row groups in memory. Of each stream these are the buffer that it is in, and the one that its begin
shares with the end of the stream before, which is done with last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prelora_ray.data.draws import Draw, generator

Ids = NDArray[np.int64]


def worker_cells(rank: int, world_size: int, num_cells: int) -> range:
    """Cells that worker `rank` serves in every batch."""
    return range(rank * num_cells // world_size, (rank + 1) * num_cells // world_size)


def max_worker_cells(world_size: int, num_cells: int) -> int:
    """The most cells that any worker serves: what all workers pad their slices to."""
    return -(-num_cells // world_size)


def first_rows(row_groups: Sequence[int], num_rows: int) -> tuple[int, ...]:
    """Rows of each row group that are among the first `num_rows` of all; those of no such row are left out."""
    starts = itertools.accumulate(row_groups, initial=0)
    return tuple(min(rows, num_rows - start) for rows, start in zip(row_groups, starts, strict=False) if start < num_rows)


@dataclass(frozen=True)
class Order:
    """The order of one split: `row_groups` holds the rows of each row group, in file order.

    Sample ids are row numbers, 0 to the sum of `row_groups`. With ``seed=None`` the order is the
    file's, for evaluation.
    """

    row_groups: tuple[int, ...]
    num_cells: int
    cell: int
    """Samples in a cell."""
    seed: int | None
    buffer: int = 16
    """Row groups whose rows are shuffled together."""

    def __post_init__(self) -> None:
        if min(self.num_cells, self.cell, self.buffer, *self.row_groups) < 1:
            raise ValueError("cells, samples in a cell, row groups in a buffer and rows in a row group are at least 1")

    @cached_property
    def num_rows(self) -> int:
        return sum(self.row_groups)

    @property
    def num_batches(self) -> int:
        """Global batches in an epoch; the last ones may be smaller."""
        longest = -(-self.num_rows // self.num_cells)
        return -(-longest // self.cell)

    def epoch(self, epoch: int, cells: Sequence[int]) -> Ids:
        """Sample ids of `cells`, consecutive ones, in the order of one epoch: those of all cells are (num_rows,).

        Takes memory for these ids and for one buffer. What comes in front of them is drawn too, and not kept.
        """
        first, last = self._first_row(cells[0]), self._first_row(cells[-1] + 1)
        if self.seed is None:
            return np.arange(first, last)
        rng = generator(self.seed, Draw.ORDER, epoch)
        start = np.concatenate([[0], np.cumsum(self.row_groups)])
        permutation = rng.permutation(len(self.row_groups))
        ids, begin = np.empty(last - first, np.int64), 0
        for i in range(0, len(permutation), self.buffer):
            groups = permutation[i : i + self.buffer]
            end = begin + int((start[groups + 1] - start[groups]).sum())
            if end <= first:
                rng.shuffle(np.empty(end - begin, np.int64))  # draws as much as for rows
            else:
                rows = np.concatenate([np.arange(start[g], start[g + 1]) for g in groups])
                rng.shuffle(rows)
                ids[max(begin - first, 0) : end - first] = rows[max(first - begin, 0) : last - begin]
            begin = end
            if begin >= last:
                break
        return ids

    def _first_row(self, cell: int) -> int:
        """Where the stream of a cell begins in an epoch's order."""
        return cell * self.num_rows // self.num_cells

    def cell_span(self, batch: int, cell: int) -> tuple[int, int]:
        """Where cell `cell` of batch `batch` lies in an epoch's order: start and stop, equal where it is empty."""
        first, last = self._first_row(cell), self._first_row(cell + 1)
        return min(first + batch * self.cell, last), min(first + (batch + 1) * self.cell, last)

    def rows_from(self, batch: int) -> int:
        """Samples in global batch `batch` and in those that follow it in an epoch, over all workers."""
        rows, longer = divmod(self.num_rows, self.num_cells)  # so many streams have a row more than the others
        taken = batch * self.cell
        return (self.num_cells - longer) * max(rows - taken, 0) + longer * max(rows + 1 - taken, 0)

    def batch_size(self, batch: int) -> int:
        """Samples in global batch `batch`, over all workers."""
        return self.rows_from(batch) - self.rows_from(batch + 1)

    def slots(self, ids: Ids, batch: int, cells: Sequence[int], num_slots: int) -> Ids:
        """Sample ids of a worker's slice of one batch, (num_slots,), -1 where a slot is empty.

        `ids` is ``epoch(n, cells)``. The i-th of `cells` fills the slots from ``i * cell`` on, so that a
        sample keeps its place in its cell.
        """
        slots, begin = np.full(num_slots, -1), self._first_row(cells[0])
        for i, cell in enumerate(cells):
            start, stop = self.cell_span(batch, cell)
            slots[i * self.cell : i * self.cell + stop - start] = ids[start - begin : stop - begin]
        return slots

    def ids_from(self, ids: Ids, batch: int, cells: Sequence[int]) -> Ids:
        """Those of `ids`, which is ``epoch(n, cells)``, that are in global batch `batch` or one that follows it."""
        begin = self._first_row(cells[0])
        spans = [(self.cell_span(batch, cell)[0], self._first_row(cell + 1)) for cell in cells]
        return np.concatenate([ids[start - begin : stop - begin] for start, stop in spans])
