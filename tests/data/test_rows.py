"""Rows by id, read ahead: which ones, how many row groups are held for it, and what a bucket is asked for."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prelora_ray.bench.bucket import bucket as bucket_of
from prelora_ray.bench.rehearsal import made_up_plan, row_groups_in_use
from prelora_ray.data import rows
from prelora_ray.data.batch import Pass
from prelora_ray.data.damage import DamagedDataError
from prelora_ray.data.image_rows import COLUMNS
from prelora_ray.data.manifest import Shard
from prelora_ray.data.order import Ids
from prelora_ray.data.rows import AHEAD, READS, RowReader
from prelora_ray.data.stream import _blocks
from prelora_ray.storage import Storage

FILES, ROWS, GROUP = 6, 90, 4
GROUPS = FILES * -(-ROWS // GROUP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 22 row groups of 4 rows and one of 2; the image of row i is the text of i."""
    path = tmp_path_factory.mktemp("rows")
    for file in range(FILES):
        ids = range(file * ROWS, (file + 1) * ROWS)
        table = pa.table({"image": [str(i).encode() for i in ids], "label": [i % 7 for i in ids], "source": [""] * ROWS})
        pq.write_table(table, path / f"{file}.parquet", row_group_size=GROUP, use_dictionary=False)
    return path


@pytest.fixture(scope="module")
def shards(folder: Path) -> tuple[Shard, ...]:
    groups = (GROUP,) * (ROWS // GROUP) + (ROWS % GROUP,)
    contents = [(folder / f"{i}.parquet").read_bytes() for i in range(FILES)]
    return tuple(
        Shard(f"{i}.parquet", groups, len(content), hashlib.sha256(content).hexdigest()) for i, content in enumerate(contents)
    )


def blocks_of(ids: Ids, size: int = 16) -> list[Ids]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def assert_rows(columns: Iterator[dict[str, pa.Array]], blocks: list[Ids]) -> None:
    for block, of_block in zip(blocks, columns, strict=True):
        assert of_block["image"].to_pylist() == [str(i).encode() for i in block]
        assert of_block["label"].to_pylist() == [i % 7 for i in block]


@pytest.mark.parametrize("ids", [np.arange(FILES * ROWS), np.random.default_rng(0).permutation(FILES * ROWS)[:400]])
def test_each_row_comes_in_its_place(folder, shards, ids):
    reader = RowReader(str(folder), shards, COLUMNS)
    for _ in range(2):  # one reader serves epoch after epoch
        assert_rows(reader.read_blocks(blocks_of(ids), ids), blocks_of(ids))


def test_blocks_without_rows_are_empty(folder, shards):
    blocks = [np.array([], np.int64), np.array([5, 3])]
    assert_rows(RowReader(str(folder), shards, COLUMNS).read_blocks(blocks, np.array([3, 5])), blocks)


def test_a_bucket_has_the_rows_of_a_disk(folder, shards, bucket, tmp_path):
    copy = Storage(f"{bucket}/{tmp_path.name}")
    for shard in shards:
        copy.write_bytes(shard.file, (folder / shard.file).read_bytes())
    ids = np.random.default_rng(1).permutation(FILES * ROWS)
    assert_rows(RowReader(str(copy), shards, COLUMNS).read_blocks(blocks_of(ids), ids), blocks_of(ids))


def test_a_bucket_is_asked_once_for_a_row_group_and_for_many_at_a_time(folder, shards):
    """Beside the size and the footer of each file, which it is asked for once."""
    ids = np.arange(FILES * ROWS)
    with bucket_of(folder, latency=0.05) as place:
        reader = RowReader(place.uri, shards, COLUMNS)
        assert_rows(reader.read_blocks(blocks_of(ids), ids), blocks_of(ids))
        assert place.requests == GROUPS + 2 * FILES
        assert 3 * READS // 4 <= place.most_at_a_time <= READS
        before = place.requests
        assert_rows(reader.read_blocks(blocks_of(ids), ids), blocks_of(ids))
        assert place.requests == before + GROUPS


def test_a_bucket_that_throttles_is_read_all_the_same(folder, shards):
    ids = np.arange(FILES * ROWS)
    with bucket_of(folder, latency=0, requests_per_second=60) as place:
        reader = RowReader(place.uri, shards, COLUMNS)
        assert_rows(reader.read_blocks(blocks_of(ids), ids), blocks_of(ids))
        assert place.refused > 0


def test_a_busy_bucket_is_asked_for_no_whole_shard(folder, shards, monkeypatch):
    """Which is how damage is told from it."""
    whole: list[str] = []
    failures = iter([True] * 4 + [False])

    class Throttled(RowReader):
        def _read_table(self, name: str, index: int) -> pa.Table:
            if next(failures):
                raise OSError("AWS Error SLOW_DOWN")
            return super()._read_table(name, index)

    with bucket_of(folder, latency=0) as place:
        reader = Throttled(place.uri, shards, COLUMNS)
        monkeypatch.setattr(reader._is_over, "wait", lambda seconds: False)
        monkeypatch.setattr(Storage, "read_bytes", lambda self, name: whole.append(name) or b"")
        assert len(reader.read(np.arange(GROUP))["image"]) == GROUP
    assert whole == []


def test_no_shard_is_checked_once_nobody_waits_for_it(folder, shards, monkeypatch):
    whole: list[str] = []
    monkeypatch.setattr(Storage, "read_bytes", lambda self, name: whole.append(name) or b"")

    class Failing(RowReader):
        def _read_table(self, name: str, index: int) -> pa.Table:
            self._is_over.set()
            raise OSError("unexpected end of stream")

    with pytest.raises(OSError, match="unexpected end"):
        Failing(str(folder), shards, COLUMNS).read(np.arange(GROUP))
    assert whole == []


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_a_bucket_is_asked_again_after_growing_waits_and_a_disk_is_not(folder, shards, monkeypatch, place):
    """Where its own client has given up."""
    waits: list[float] = []
    failures = iter([True, True, True, False])

    class Throttled(RowReader):
        def _read_table(self, name: str, index: int) -> pa.Table:
            if next(failures):
                raise OSError("AWS Error SLOW_DOWN")
            return super()._read_table(name, index)

    def read() -> dict[str, pa.Array]:
        reader = Throttled(str(folder) if place == "disk" else uri, shards, COLUMNS)
        monkeypatch.setattr(reader._is_over, "wait", waits.append)
        return reader.read(np.arange(GROUP))

    with bucket_of(folder, latency=0) as served:
        uri = served.uri
        if place == "disk":
            with pytest.raises(OSError, match="SLOW_DOWN"):
                read()
            assert waits == []
        else:
            assert read()["image"].to_pylist() == [b"0", b"1", b"2", b"3"]
            assert [wait / base for wait, base in zip(waits, (1, 2, 4), strict=True)] == pytest.approx([1, 1, 1], abs=0.5)


def test_damage_in_a_bucket_is_named_behind_further_tries_and_looked_for_once(folder, shards, tmp_path, monkeypatch):
    """Parquet tells much of it as an OSError, as a bucket tells that it is busy."""
    copy = shutil.copytree(folder, tmp_path / "damaged")
    content = bytearray((copy / shards[0].file).read_bytes())
    content[4:40] = bytes(36)  # the first page's header
    (copy / shards[0].file).write_bytes(content)
    whole: list[str] = []
    read_bytes = Storage.read_bytes
    monkeypatch.setattr(Storage, "read_bytes", lambda self, name: whole.append(name) or read_bytes(self, name))
    waits: list[float] = []
    with bucket_of(copy, latency=0) as place:
        reader = RowReader(place.uri, shards, COLUMNS)
        monkeypatch.setattr(reader._is_over, "wait", waits.append)
        for _ in range(2):
            with pytest.raises(DamagedDataError, match=f"{shards[0].file} is damaged: its SHA-256 is"):
                reader.read(np.arange(GROUP))
    assert len(waits) == 2 * len(rows._BUCKET_WAITS) and whole == [shards[0].file]


def test_who_stops_reading_does_not_wait_for_the_next_try(folder, shards, monkeypatch):
    monkeypatch.setattr(rows, "_BUCKET_WAITS", (60.0,))
    waits = threading.Event()

    class Throttled(RowReader):
        def _read_table(self, name: str, index: int) -> pa.Table:
            if name != shards[0].file:
                waits.set()
                raise OSError("AWS Error SLOW_DOWN")
            return super()._read_table(name, index)

    ids = np.arange(2 * ROWS)
    with bucket_of(folder, latency=0) as place:
        blocks = Throttled(place.uri, shards, COLUMNS).read_blocks([ids[:GROUP], ids[GROUP:]], ids)
        next(blocks)
        assert waits.wait(10)
        begin = time.monotonic()
        blocks.close()
    assert time.monotonic() - begin < 20


class Group(dict[str, pa.Array]):
    """Which others may refer to weakly."""


@pytest.mark.parametrize("workers", [8, 64])
def test_row_groups_that_are_held_are_those_in_use_and_a_bounded_number_ahead(workers):
    plan = made_up_plan(400_000, rank=1, world_size=workers)
    order = plan.orders["train"]
    held: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()
    reads: list[int] = []

    class Counted(RowReader):
        def _read(self, group: int) -> Group:
            num = order.row_groups[group]
            held[group] = content = Group(image=pa.array([b""] * num, pa.large_binary()), label=pa.array([0] * num))
            reads.append(group)
            return content

    ids = order.epoch(0, plan.cells)
    blocks = (slots[slots >= 0] for _, slots in _blocks(plan, Pass("train", 0), ids))
    counts = [len(held) for _ in Counted("unused", plan.manifest.splits["train"], COLUMNS).read_blocks(blocks, ids)]
    needed, in_use = row_groups_in_use(plan)
    assert len(reads) == len(set(reads)) == needed
    assert in_use - len(plan.cells) <= max(counts) <= in_use + AHEAD + 1
    assert in_use <= len(plan.cells) * (2 * order.buffer + 1)
