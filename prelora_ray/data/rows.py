"""Rows of prepared Parquet by sample id, in any order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.augment import undecodable
from prelora_ray.data.batch import Columns
from prelora_ray.data.damage import check_shard, damaged_image
from prelora_ray.data.image_rows import COLUMNS
from prelora_ray.data.manifest import Manifest, Shard
from prelora_ray.data.order import Ids
from prelora_ray.data.token_rows import TokenRows, Tokens
from prelora_ray.storage import Storage

_OPEN_FILES = 32


def read_encoded(path: str, shards: Sequence[Shard], count: int) -> list[bytes]:
    """The first `count` encoded images of a split, without Ray. Raises DamagedDataError where one cannot be decoded."""
    reader = RowReader(path, tuple(shards), COLUMNS)
    ids = np.arange(min(count, sum(sum(shard.row_groups) for shard in shards)))
    reader.expect(ids)
    images = cast("list[bytes]", reader.take(ids)["image"].to_pylist())
    for sample, image in enumerate(images):
        if (reason := undecodable(image)) is not None:
            raise damaged_image(Storage(path), shards, sample, reason)
    return images


def read_tokens(path: str, manifest: Manifest, count: int) -> Tokens:
    """The first `count` validation sequences, (n, length), without Ray."""
    assert manifest.text is not None, "of text"
    rows = TokenRows(manifest.text, len(manifest.classes), seed=0)
    reader = RowReader(path, manifest.splits["val"], rows.columns)
    ids = np.arange(min(count, manifest.num_images("val")))
    reader.expect(ids)
    tokens: Tokens = reader.take(ids)["tokens"].flatten().to_numpy().reshape(len(ids), -1)
    return tokens.copy()


class RowReader:
    """Rows of one split by id. A row group is read once an epoch, and dropped after its last row."""

    def __init__(self, path: str, shards: tuple[Shard, ...], columns: Columns) -> None:
        self._columns = columns
        self._folder = Storage(path)
        self._groups = [(shard, i) for shard in shards for i in range(len(shard.row_groups))]
        self._start = np.concatenate([[0], np.cumsum([rows for shard in shards for rows in shard.row_groups])])
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._open: dict[int, Mapping[str, pa.Array]] = {}
        self._left = np.zeros(len(self._groups), np.int64)

    def expect(self, ids: Ids) -> None:
        """Announces all ids, in any order, that `take` will be asked for until the next call."""
        self._left = np.bincount(self._group(ids), minlength=len(self._groups))
        self._open = {}

    def take(self, ids: Ids) -> dict[str, pa.Array]:
        """The columns of `ids`, in their order."""
        groups = self._group(ids)
        positions = []
        parts = {name: [pa.array([], type_)] for name, type_ in self._columns.items()}
        for group in np.unique(groups):
            if group not in self._open:
                self._open[group] = self._read(int(group))
            where = np.flatnonzero(groups == group)
            rows = pa.array(ids[where] - self._start[group])
            for name, part in parts.items():
                part.append(self._open[group][name].take(rows))
            positions.append(where)
            self._left[group] -= len(where)
            if self._left[group] <= 0:
                del self._open[group]
        back = pa.array(np.argsort(np.concatenate(positions))) if positions else pa.array([], pa.int64())
        return {name: pa.concat_arrays(part).take(back) for name, part in parts.items()}

    def _group(self, ids: Ids) -> Ids:
        return np.searchsorted(self._start, ids, "right") - 1

    def _read(self, group: int) -> dict[str, pa.Array]:
        """Raises DamagedDataError where the shard is not what its manifest says; any other error may pass."""
        shard, index = self._groups[group]
        try:
            table = self._file(shard.file).read_row_group(index, columns=list(self._columns))
            return {name: table[name].combine_chunks().cast(type_) for name, type_ in self._columns.items()}
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
