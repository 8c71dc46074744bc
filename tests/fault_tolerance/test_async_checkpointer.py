"""Checkpoints are written beside training, and a save that fails costs nothing but itself."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref

import pytest

from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.fault_tolerance import background
from prelora_ray.fault_tolerance.async_checkpointer import AsyncCheckpointer
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, Retention
from prelora_ray.run_folder import RunFolder
from tests.fault_tolerance.test_checkpoint import checkpoint


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(RunFolder(tmp_path))


def start(checkpointer: AsyncCheckpointer, content: Snapshot) -> None:
    assert checkpointer.start(lambda: content)


def test_training_goes_on_while_it_writes_and_only_what_is_whole_counts(checkpoints, monkeypatch):
    may_write = threading.Event()
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda content: (may_write.wait(), save(content)))
    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1))
    start(checkpointer, checkpoint(1))
    assert checkpointer.is_busy
    assert checkpoints.newest() == (None, {})
    assert checkpointer.results() == []
    may_write.set()
    checkpointer.wait()
    assert checkpoints.names() == ["00001-000000"]
    assert [(saved.name, saved.error) for saved in checkpointer.results()] == [("00001-000000", None)]


def test_a_failed_save_leaves_the_older_checkpoints_and_the_next_one_tries_again(checkpoints, tmp_path):
    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1))
    start(checkpointer, checkpoint(1))
    checkpointer.wait()
    (tmp_path / "checkpoints" / "00002-000000").write_text("in the way")
    start(checkpointer, checkpoint(2))
    checkpointer.wait()
    assert checkpointer.failure is not None
    assert [bool(saved.error) for saved in checkpointer.results()] == [False, True]
    assert checkpoints.names() == ["00001-000000"]
    checkpoints.load("00001-000000")
    start(checkpointer, checkpoint(3))
    checkpointer.wait()
    assert checkpointer.failure is None
    assert checkpoints.names()[-1] == "00003-000000"


def test_what_failed_is_written_once_there_is_room(checkpoints, tmp_path):
    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1))
    (tmp_path / "checkpoints").write_text("in the way")
    start(checkpointer, checkpoint(1, batch=4))
    checkpointer.wait()
    assert checkpointer.failure is not None
    (tmp_path / "checkpoints").unlink()
    checkpointer.retry()
    assert checkpoints.names() == ["00001-000004"]


def test_a_save_beside_a_slow_one_is_skipped_or_waits_with_signs_of_life(checkpoints, monkeypatch):
    may_write = threading.Event()
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda content: (may_write.wait(), save(content)))
    monkeypatch.setattr(background, "_BEAT_SECONDS", 0.01)
    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=9))
    start(checkpointer, checkpoint(1))
    for seconds in (0.0, 0.05):
        assert not checkpointer.start(lambda: pytest.fail("a second snapshot takes memory"), seconds)
    beats: list[int] = []

    def beat() -> None:
        beats.append(len(beats))
        if len(beats) == 5:  # as long as that, the first save is being written
            may_write.set()

    assert checkpointer.start(lambda: checkpoint(3), meanwhile=beat)
    checkpointer.wait(meanwhile=beat)
    assert len(beats) >= 5
    assert checkpoints.names() == ["00001-000000", "00003-000000"]


def test_what_failed_is_let_go_before_another_snapshot_takes_as_much_memory(checkpoints, tmp_path):
    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1))
    (tmp_path / "checkpoints").write_text("in the way")
    content = checkpoint(1)
    kept = weakref.ref(content)
    start(checkpointer, content)
    checkpointer.wait()
    del content

    def take() -> Snapshot:
        gc.collect()
        assert kept() is None
        return checkpoint(2)

    checkpointer.start(take)
    checkpointer.wait()


def test_old_checkpoints_that_cannot_be_removed_are_no_failed_save(checkpoints, monkeypatch, caplog):
    def prune(_: Retention) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(checkpoints, "prune", prune)
    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1))
    start(checkpointer, checkpoint(1))
    checkpointer.wait()
    assert (checkpointer.failure, [saved.error for saved in checkpointer.results()]) == (None, [None])
    assert "older checkpoints stay: Read-only file system" in caplog.text


def test_an_unreadable_older_checkpoint_does_not_stop_a_save(checkpoints, tmp_path):
    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1))
    start(checkpointer, checkpoint(1))
    checkpointer.wait()
    shutil.copytree(tmp_path / "checkpoints" / "00001-000000", tmp_path / "checkpoints" / "00000-000007")
    (tmp_path / "checkpoints" / "00000-000007" / "manifest.json").write_text("{")
    start(checkpointer, checkpoint(2))
    checkpointer.wait()
    assert [saved.error for saved in checkpointer.results()] == [None, None]
    assert checkpoints.names() == ["00002-000000"]


def test_no_checkpoint_stands_before_the_records_of_what_is_in_front_of_it(checkpoints):
    """Or an attempt that goes on from it would leave a gap in them."""
    has_room = False

    def write_records() -> None:
        assert checkpoints.names() == []
        if not has_room:
            raise OSError("no room for the records")

    checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1), write_records)
    start(checkpointer, checkpoint(1))
    checkpointer.wait()
    assert checkpointer.failure == "OSError: no room for the records"
    assert checkpoints.names() == []
    has_room = True
    checkpointer.retry()
    assert checkpointer.failure is None
    assert checkpoints.names() == ["00001-000000"]
