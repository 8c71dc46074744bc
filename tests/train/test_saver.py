"""Checkpoints are written beside training, and a save that fails costs nothing but itself."""

from __future__ import annotations

import shutil
import threading

import pytest

from prelora_ray.run_folder import RunFolder
from prelora_ray.train.checkpoint import Checkpoints, Retention
from prelora_ray.train.saver import Saver
from tests.train.test_checkpoint import checkpoint


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(RunFolder(tmp_path))


def test_training_goes_on_while_it_writes_and_only_what_is_whole_counts(checkpoints, monkeypatch):
    may_write = threading.Event()
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda content: (may_write.wait(), save(content)))
    saver = Saver(checkpoints, Retention(keep=1))
    saver.start(checkpoint(1))
    assert saver.is_busy
    assert checkpoints.newest() == (None, {})
    assert saver.results() == []
    may_write.set()
    saver.wait()
    assert checkpoints.names() == ["00001-000000"]
    assert [(saved.name, saved.error) for saved in saver.results()] == [("00001-000000", None)]


def test_a_failed_save_leaves_the_older_checkpoints_and_the_next_one_tries_again(checkpoints, tmp_path):
    saver = Saver(checkpoints, Retention(keep=1))
    saver.start(checkpoint(1))
    saver.wait()
    (tmp_path / "checkpoints" / "00002-000000").write_text("in the way")
    saver.start(checkpoint(2))
    saver.wait()
    assert saver.failure is not None
    assert [bool(saved.error) for saved in saver.results()] == [False, True]
    assert checkpoints.names() == ["00001-000000"]
    checkpoints.load("00001-000000")
    saver.start(checkpoint(3))
    saver.wait()
    assert saver.failure is None
    assert checkpoints.names()[-1] == "00003-000000"


def test_what_failed_is_written_once_there_is_room(checkpoints, tmp_path):
    saver = Saver(checkpoints, Retention(keep=1))
    (tmp_path / "checkpoints").write_text("in the way")
    saver.start(checkpoint(1, batch=4))
    saver.wait()
    assert saver.failure is not None
    (tmp_path / "checkpoints").unlink()
    saver.retry()
    assert checkpoints.names() == ["00001-000004"]


def test_an_unreadable_older_checkpoint_does_not_stop_a_save(checkpoints, tmp_path):
    saver = Saver(checkpoints, Retention(keep=1))
    saver.start(checkpoint(1))
    saver.wait()
    shutil.copytree(tmp_path / "checkpoints" / "00001-000000", tmp_path / "checkpoints" / "00000-000007")
    (tmp_path / "checkpoints" / "00000-000007" / "manifest.json").write_text("{")
    saver.start(checkpoint(2))
    saver.wait()
    assert [saved.error for saved in saver.results()] == [None, None]
    assert checkpoints.names() == ["00002-000000"]
