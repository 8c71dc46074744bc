"""Rows of prepared Parquet by sample id, in any order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.augment import undecodable
from prelora_ray.data.damage import check_shard, damaged_image
from prelora_ray.data.manifest import Shard
from prelora_ray.data.order import Ids
from prelora_ray.storage import Storage

_OPEN_FILES = 32


def read_encoded(path: str, shards: Sequence[Shard], count: int) -> list[bytes]:
    """The first `count` encoded images of a split, without Ray. Raises DamagedDataError where one cannot be decoded."""
    reader = RowReader(path, tuple(shards))
    ids = np.arange(min(count, sum(sum(shard.row_groups) for shard in shards)))
    reader.expect(ids)
    images = cast("list[bytes]", reader.take(ids)[0].to_pylist())
    for sample, image in enumerate(images):
        if (reason := undecodable(image)) is not None:
            raise damaged_image(Storage(path), shards, sample, reason)
    return images


class RowReader:
    """Rows of one split by id. A row group is read once an epoch, and dropped after its last row."""

    def __init__(self, path: str, shards: tuple[Shard, ...]) -> None:
        self._folder = Storage(path)
        self._groups = [(shard, i) for shard in shards for i in range(len(shard.row_groups))]
        self._start = np.concatenate([[0], np.cumsum([rows for shard in shards for rows in shard.row_groups])])
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._open: dict[int, tuple[pa.Array, pa.Array]] = {}
        self._left = np.zeros(len(self._groups), np.int64)

    def expect(self, ids: Ids) -> None:
        """Announces all ids, in any order, that `take` will be asked for until the next call."""
        self._left = np.bincount(self._group(ids), minlength=len(self._groups))
        self._open = {}

    def take(self, ids: Ids) -> tuple[pa.Array, pa.Array]:
        """Images (large_binary) and labels (int64) of `ids`, in their order."""
        groups = self._group(ids)
        positions, images, labels = [], [pa.array([], pa.large_binary())], [pa.array([], pa.int64())]
        for group in np.unique(groups):
            if group not in self._open:
                self._open[group] = self._read(int(group))
            where = np.flatnonzero(groups == group)
            rows = pa.array(ids[where] - self._start[group])
            images.append(self._open[group][0].take(rows))
            labels.append(self._open[group][1].take(rows))
            positions.append(where)
            self._left[group] -= len(where)
            if self._left[group] <= 0:
                del self._open[group]
        back = pa.array(np.argsort(np.concatenate(positions))) if positions else pa.array([], pa.int64())
        return pa.concat_arrays(images).take(back), pa.concat_arrays(labels).take(back)

    def _group(self, ids: Ids) -> Ids:
        return np.searchsorted(self._start, ids, "right") - 1

    def _read(self, group: int) -> tuple[pa.Array, pa.Array]:
        """Raises DamagedDataError where the shard is not what its manifest says; any other error may pass."""
        shard, index = self._groups[group]
        try:
            table = self._file(shard.file).read_row_group(index, columns=["image", "label"])
            images = table["image"].combine_chunks().cast(pa.large_binary())
            return images, table["label"].combine_chunks().cast(pa.int64())
        except Exception:
            check_shard(self._folder, shard, self._folder.read_bytes(shard.file))
            raise

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[name] = pq.ParquetFile(self._folder.open_file(name))
        self._files.move_to_end(name)
        return self._files[name]
