"""Rows of prepared Parquet by sample id, in any order, read ahead of whom they are for."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.augment import undecodable
from prelora_ray.data.batch import Columns
from prelora_ray.data.damage import DamagedDataError, check_shard, damaged_image
from prelora_ray.data.image_rows import COLUMNS
from prelora_ray.data.manifest import Manifest, Shard
from prelora_ray.data.order import Ids
from prelora_ray.data.token_rows import TokenRows, Tokens
from prelora_ray.storage import Storage

READS = 16
"""Row groups that are read at a time. A bucket that takes 20 ms for a request has 800 a second read from it so."""
AHEAD = 32
"""Row groups that are read, or on their way, before a block asks for rows of theirs."""
_BLOCKS_AHEAD = 8
"""Blocks that are looked at for what they will ask for."""
_OPEN_FILES = 32
_OPEN_OBJECTS = 1024
"""Files of a bucket whose sizes and footers are kept, with the default settings 140 kB each."""
_BUCKET_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds, more or less, before each further try of a read. In each try the bucket's own client tries for some 6 s."""
_Group = Mapping[str, pa.Array]
"""The columns of a row group."""


def read_encoded(path: str, shards: Sequence[Shard], count: int) -> list[bytes]:
    """The first `count` encoded images of a split, without Ray. Raises DamagedDataError where one cannot be decoded."""
    ids = np.arange(min(count, sum(sum(shard.row_groups) for shard in shards)))
    images = cast("list[bytes]", RowReader(path, shards, COLUMNS).read(ids)["image"].to_pylist())
    for sample, image in enumerate(images):
        if (reason := undecodable(image)) is not None:
            raise damaged_image(Storage(path), shards, sample, reason)
    return images


def read_tokens(path: str, manifest: Manifest, count: int) -> Tokens:
    """The first `count` validation sequences, (n, length), without Ray."""
    assert manifest.text is not None, "of text"
    rows = TokenRows(manifest.text, len(manifest.classes), seed=0)
    ids = np.arange(min(count, manifest.num_images("val")))
    columns = RowReader(path, manifest.splits["val"], rows.columns).read(ids)
    tokens: Tokens = columns["tokens"].flatten().to_numpy().reshape(len(ids), -1)
    return tokens.copy()


class RowReader:
    """Rows of one split by id. A row group is read once an epoch, and dropped after its last row.

    `num_reads` row groups are read at a time, in the order of need. Held are those that rows were taken of and are yet
    to be, those that the next block needs, and at most `AHEAD` more.
    """

    def __init__(self, path: str, shards: Sequence[Shard], columns: Columns, num_reads: int = READS) -> None:
        self._columns = columns
        self._folder = Storage(path)
        self._shards = shards
        self._num_reads = num_reads
        self._first_group = np.cumsum([0, *(len(shard.row_groups) for shard in shards)])
        self._start = np.cumsum(np.fromiter(itertools.chain([0], *(shard.row_groups for shard in shards)), np.int64))
        self._files: OrderedDict[str, Future[_File]] = OrderedDict()
        """By name, the one that was read last behind all others."""
        self._files_lock = threading.Lock()
        self._damage: dict[str, str | None] = {}
        """By name, what is wrong with each shard that was to be checked; None where nothing was found."""
        self._check_lock = threading.Lock()
        self._is_over = threading.Event()
        """Set once nobody waits for what is read any more."""
        if not self._folder.is_local:
            pa.set_io_thread_count(max(pa.io_thread_count(), num_reads))  # which a bucket's requests wait in

    def read(self, ids: Ids) -> dict[str, pa.Array]:
        """The columns of `ids`, in their order."""
        (columns,) = self.read_blocks([ids], ids)
        return columns

    def read_blocks(self, blocks: Iterable[Ids], all_ids: Ids) -> Iterator[dict[str, pa.Array]]:
        """The columns of each block of ids in turn, in the block's order. `all_ids`: of all blocks, in any order."""
        return self._read_blocks(iter(blocks), np.bincount(self._group(all_ids), minlength=len(self._start) - 1))

    def _read_blocks(self, blocks: Iterator[Ids], rows: Ids) -> Iterator[dict[str, pa.Array]]:
        """`rows`: of each row group, how many the blocks have together."""
        next_blocks: deque[Ids] = deque()
        pool = ThreadPoolExecutor(self._num_reads)
        self._is_over.clear()
        ahead = _ReadAhead(self._read, pool, rows)
        try:
            while True:
                for block in itertools.islice(blocks, _BLOCKS_AHEAD + 1 - len(next_blocks)):
                    next_blocks.append(block)
                    ahead.expect(self._group(block))
                if not next_blocks:
                    return
                yield self._take(next_blocks.popleft(), ahead)
        finally:
            self._is_over.set()
            pool.shutdown(cancel_futures=True)

    def _take(self, ids: Ids, ahead: _ReadAhead) -> dict[str, pa.Array]:
        groups = self._group(ids)
        needed = np.unique(groups).tolist()
        ahead.begin(set(needed))
        positions = []
        parts = {name: [pa.array([], type_)] for name, type_ in self._columns.items()}
        for group in needed:
            where = np.flatnonzero(groups == group)
            columns = ahead.take(group, len(where))
            rows = pa.array(ids[where] - self._start[group])
            for name, part in parts.items():
                part.append(columns[name].take(rows))
            positions.append(where)
        back = pa.array(np.argsort(np.concatenate(positions))) if positions else pa.array([], pa.int64())
        return {name: pa.concat_arrays(part).take(back) for name, part in parts.items()}

    def _group(self, ids: Ids) -> Ids:
        return np.searchsorted(self._start, ids, "right") - 1

    def _read(self, group: int) -> _Group:
        """Raises DamagedDataError where the shard is not what its manifest says; any other error may pass.

        In a bucket it is tried again, after growing waits that differ from thread to thread, until the pass is over.
        """
        of = int(np.searchsorted(self._first_group, group, "right")) - 1
        shard, index = self._shards[of], group - int(self._first_group[of])
        waits = iter(() if self._folder.is_local else _BUCKET_WAITS)
        while True:
            try:
                table = self._read_table(shard.file, index)
                return {name: table[name].combine_chunks().cast(type_) for name, type_ in self._columns.items()}
            except Exception as error:
                may_pass = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
                wait = next(waits, None) if may_pass else None
                if wait is None:
                    self._check(shard)
                if wait is None or self._is_over.wait(wait * random.uniform(0.5, 1.5)):
                    raise

    def _check(self, shard: Shard) -> None:
        """Raises DamagedDataError where a shard that can be read is not what its manifest says. One is read at a time,
        and each once, as it is large; none once the pass is over."""
        with self._check_lock:
            if shard.file not in self._damage and not self._is_over.is_set():
                self._damage[shard.file] = None
                with contextlib.suppress(OSError):
                    content = self._folder.read_bytes(shard.file)
                    try:
                        check_shard(self._folder, shard, content)
                    except DamagedDataError as error:
                        self._damage[shard.file] = str(error)
        if (damage := self._damage.get(shard.file)) is not None:
            raise DamagedDataError(damage)

    def _read_table(self, name: str, index: int) -> pa.Table:
        file = self._file(name)
        # One of its own for each row group, as several threads read. Columns that lie side by side are one request.
        reader = pq.ParquetFile(file.content, metadata=file.footer, pre_buffer=not self._folder.is_local)
        return reader.read_row_group(index, list(self._columns), use_threads=False)

    def _file(self, name: str) -> _File:
        """Opened by the first thread that asks for it; others wait for that."""
        with self._files_lock:
            if opens := name not in self._files:
                self._files[name] = Future()
                if len(self._files) > (_OPEN_FILES if self._folder.is_local else _OPEN_OBJECTS):
                    self._files.popitem(last=False)  # closed once no thread reads it
            self._files.move_to_end(name)
            file = self._files[name]
        if opens:
            try:
                content = self._folder.open_file(name)
                file.set_result(_File(content, pq.read_metadata(content)))
            except BaseException as error:
                with self._files_lock:
                    self._files.pop(name, None)  # a further try opens it anew
                file.set_exception(error)
        return file.result()


class _ReadAhead:
    """Row groups, from when a block that needs them comes into sight until their last row is taken."""

    def __init__(self, read: Callable[[int], _Group], pool: ThreadPoolExecutor, rows: Ids) -> None:
        """`rows`: of each row group, how many will be taken."""
        self._read = read
        self._pool = pool
        self._left = rows
        self._is_expected = np.zeros(len(rows), bool)
        self._expected: deque[int] = deque()
        """In the order of need, those that are not begun."""
        self._begun: dict[int, Future[_Group]] = {}
        self._ahead: set[int] = set()
        """Those of them that no block has needed."""
        self._in_use: dict[int, _Group] = {}
        """Those that rows were taken of, and are yet to be."""

    def expect(self, groups: Ids) -> None:
        """Of a block that comes behind all those before."""
        new = np.unique(groups[~self._is_expected[groups]])
        self._is_expected[new] = True
        self._expected.extend(new.tolist())

    def begin(self, needed: set[int]) -> None:
        """Begins to read those that the next block needs, and `AHEAD` of those behind it."""
        self._ahead -= needed
        while self._expected and (self._expected[0] in needed or len(self._ahead) < AHEAD):
            group = self._expected.popleft()
            self._begun[group] = self._pool.submit(self._read, group)
            if group not in needed:
                self._ahead.add(group)

    def take(self, group: int, rows: int) -> _Group:
        """Waits for a row group that was begun, and drops it with its last row."""
        columns = self._in_use.pop(group, None) or self._begun.pop(group).result()
        self._left[group] -= rows
        if self._left[group] > 0:
            self._in_use[group] = columns
        return columns


class _File(NamedTuple):
    content: pa.NativeFile
    footer: pq.FileMetaData
