"""How a run ended follows from a record of its own and from the checkpoints that are there, never from a log."""

from __future__ import annotations

import pytest

from prelora_ray.errors import InterruptedRunError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.end import FILE, End, read_end, remove_end, write_end
from prelora_ray.records import EpochLine, Event
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import TrainError, check_finished
from tests.fault_tolerance.test_checkpoint import checkpoint
from tests.lines import epoch_line, event

EPOCHS = 12


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run of 12 epochs, the last 2 of which are in its records and in no checkpoint."""
    folder = RunFolder(tmp_path)
    Checkpoints(folder).save(checkpoint(10))
    folder.write_records(EpochLine, map(epoch_line, range(EPOCHS)))
    folder.write_records(Event, [event("checkpoint", EPOCHS, checkpoint="x", seconds=1.0)])
    return folder


def test_a_run_is_finished_with_the_record_of_it_and_the_last_checkpoint(folder):
    write_end(folder, End("finished", EPOCHS, 180))
    with pytest.raises(TrainError, match="whole checkpoint of the last epoch; the same command goes on from epoch 10 of"):
        check_finished(folder, EPOCHS)
    Checkpoints(folder).save(checkpoint(EPOCHS))
    check_finished(folder, EPOCHS)
    remove_end(folder)
    with pytest.raises(TrainError, match=r"without .*end\.json, .*; the same command goes on from epoch 12 of"):
        check_finished(folder, EPOCHS)


def test_a_stop_whose_save_failed_tells_where_the_run_really_goes_on(folder):
    write_end(folder, End("stop", 11, 170))
    with pytest.raises(InterruptedRunError, match="stopped; the same command goes on from epoch 10 of"):
        check_finished(folder, EPOCHS)
    Checkpoints(folder).folder.remove_folder("00010-000000")
    with pytest.raises(InterruptedRunError, match="stopped; the same command goes on from the start of"):
        check_finished(folder, EPOCHS)


def test_a_failure_is_told_in_the_workers_words(folder):
    write_end(folder, End("failed", 11, 170, "the loss is not finite"))
    with pytest.raises(TrainError, match=r"^the loss is not finite$"):
        check_finished(folder, EPOCHS)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"end": "finished"', b"[1]"])
def test_a_damaged_record_is_none(folder, content):
    folder.write_bytes(FILE, content)
    assert read_end(folder) is None
