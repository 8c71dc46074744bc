"""A folder behaves alike on a disk and on S3."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from prelora_ray.run_folder import LineWriter, RunFolder, RunRecords
from prelora_ray.storage import Storage
from prelora_ray.train.checkpoint import Checkpoints
from prelora_ray.train.start import find_start


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_files_and_folders(folder):
    storage = Storage(folder) / "new"
    assert storage.list_files() == {}
    assert not storage.exists("a.json")
    storage.make()
    storage.write_bytes("a.json", b"1")
    storage.write_bytes("a.json", b"22")
    storage.write_json("sub/b.json", {"x": [1.5, None]})
    assert storage.exists("a.json")
    assert storage.read_bytes("a.json") == b"22"
    assert storage.list_files() == {"a.json": 2}
    assert storage.list_folders() == ["sub"]
    assert (storage / "sub").read_json("b.json") == {"x": [1.5, None]}
    storage.remove_folder("sub")
    assert storage.list_folders() == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("c.json")


def test_what_killed_writers_left_is_removed(tmp_path):
    names = ["a.json", "a.json.tmp", "b.tmp", f"a.json.{'0af3' * 8}.tmp", f"kept.json.{'0af3' * 8}.tmp"]
    for name in names:
        (tmp_path / name).touch()
    Storage(tmp_path).remove_unfinished(but=["kept.json"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*names} - {names[3]})


def test_a_writer_that_is_killed_leaves_what_is_recognised(tmp_path, monkeypatch):
    left: list[str] = []
    monkeypatch.setattr(os, "replace", lambda temporary, _: left.append(temporary))
    Storage(tmp_path).write_bytes("a.json", b"1")
    assert [str(path) for path in tmp_path.iterdir()] == left
    Storage(tmp_path).remove_unfinished()
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_on_the_disk_when_its_file_is_written(tmp_path, monkeypatch):
    """Every folder that got a new name is synced after it got it, and the file before it gets its own."""
    synced: list[str] = []
    fsync = os.fsync
    seen = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), synced.append(seen(descriptor))))
    Storage(tmp_path / "run").write_bytes("sub/a.json", b"1")
    above, run, temporary, sub = synced
    assert (above, run, sub) == (str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run/sub"))
    assert temporary.startswith(f"{tmp_path}/run/sub/a.json.")


def test_a_file_share_that_syncs_no_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    Storage(tmp_path / "run").write_bytes("a.json", b"1")
    assert Storage(tmp_path / "run").read_bytes("a.json") == b"1"


def test_events_of_an_attempt_that_dies_soon_are_there(folder):
    """So that the next attempt takes the next number."""
    records = RunRecords(RunFolder(folder), attempt=0)
    records.event("run_started", world_size=2)
    records.epoch(epoch=0)
    records.flush_events()
    assert [line["event"] for line in RunFolder(folder).read_lines("events.jsonl")] == ["run_started"]
    start, _ = find_start(RunFolder(folder), Checkpoints(RunFolder(folder)))
    assert start.attempt == 1


def test_lines_are_appended_by_one_writer_after_the_other(folder):
    for attempt in (0, 1):
        writer = LineWriter(Storage(folder), "events.jsonl")
        writer.write(attempt=attempt, event="a")
        writer.write(attempt=attempt, event="b")
        writer.flush()
    run = RunFolder(folder)
    assert [(line["attempt"], line["event"]) for line in run.read_lines("events.jsonl")] == [
        (0, "a"),
        (0, "b"),
        (1, "a"),
        (1, "b"),
    ]
