"""TensorBoard's own reader finds the run's scalars."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prelora_ray.monitor.tensorboard import TensorBoardLog
from prelora_ray.records import EpochLine, WindowLine
from prelora_ray.run_folder import RunFolder
from tests.lines import epoch_line


def line(epoch: int, loss: float, val_top1: float | None = 0.5) -> EpochLine:
    return epoch_line(epoch, loss=loss, val_top1=val_top1)


def read(folder: RunFolder) -> EventAccumulator:
    accumulator = EventAccumulator(str(Path(folder.path, "tensorboard")), purge_orphaned_data=True)
    accumulator.Reload()
    return accumulator


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_what_a_later_attempt_trains_again_replaces_what_was_written_before(folder):
    log = TensorBoardLog(folder, attempt=0, epoch=0)
    for epoch, loss in enumerate((3.0, 2.0, 1.5)):
        log.epoch(line(epoch, loss, None if epoch == 1 else 0.5))
    log = TensorBoardLog(folder, attempt=1, epoch=2)
    log.epoch(line(2, 1.25))
    test = {"change": {"query": 7.5, "fc1": None}, "loss_change": 40.0, "converged": False, "in_ramp": False}
    log.window(WindowLine(attempt=1, phase="full", window=2, epoch_end=3, loss=1.0, **test))
    log.flush()
    board = read(folder)
    assert [(event.step, event.value) for event in board.Scalars("loss/train")] == [(1, 3.0), (2, 2.0), (3, 1.25)]
    assert [event.step for event in board.Scalars("accuracy/val_top1")] == [1, 3]
    assert [(event.step, event.value) for event in board.Scalars("norm_change_percent/query")] == [(3, 7.5)]
    assert "norm_change_percent/fc1" not in board.Tags()["scalars"]


def test_a_fork_begins_with_its_trunks_epochs(folder):
    folder.write_records(EpochLine, [epoch_line(epoch, loss=2.0 - epoch, attempt=-1) for epoch in range(2)])
    TensorBoardLog(folder, attempt=0, epoch=2).epoch(line(2, 0.25))
    assert [event.value for event in read(folder).Scalars("loss/train")] == [2.0, 1.0, 0.25]
