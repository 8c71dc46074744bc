"""All that a run writes, on a full disk: nothing raises that need not, and everything is written once there is room."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from prelora_ray.fault_tolerance.async_checkpointer import AsyncCheckpointer
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, Retention
from prelora_ray.fault_tolerance.end import End, write_end
from prelora_ray.fault_tolerance.notices import STOP_FILE
from prelora_ray.method.phases import Phase
from prelora_ray.monitor.tensorboard import TensorBoardLog
from prelora_ray.run_folder import RecordWriter, RunFolder
from prelora_ray.train.found_sizes import read_found, write_found
from prelora_ray.train.run import TrainError, stop_on_sigterm, train, write_result
from tests.disk import Disk
from tests.fault_tolerance.test_checkpoint import checkpoint
from tests.lines import epoch_line, event, progress
from tests.monitor.test_tensorboard import read
from tests.runs import EPOCHS, SWITCH, assert_same_bits, final, settings, wait_inside

LINES = 100
"""More than what is left of a file's last page has room for."""


@pytest.fixture
def folder(disk: Disk) -> RunFolder:
    folder = RunFolder(disk.path / "run")
    folder.make()
    return folder


@pytest.mark.parametrize("inodes", [False, True])
def test_records_wait_for_room_in_their_order(disk, folder, inodes):
    disk.fill(inodes=inodes)
    run = settings(disk.path, disk.path, "run", 1)
    records, board = RecordWriter(folder), TensorBoardLog(folder, run, attempt=0, epoch=0)
    for epoch in range(LINES):
        records.write(event("stop", epoch))
        records.write(epoch_line(epoch))
        records.progress(progress(epoch))
        board.scalars(epoch + 1, {"loss/train": 2.0})
    assert not records.flush()
    write_found(folder, "H100", {(Phase.FULL, 8): 64})
    assert read_found(folder, "H100") == {}  # it is searched again
    disk.free()
    records.progress(progress(LINES))
    assert records.flush()
    board.flush()
    for name in ("events.jsonl", "epochs.jsonl"):
        assert [entry["epoch"] for entry in folder.read_lines(name)] == list(range(LINES))
    assert folder.read_json("progress.json")["epoch"] == LINES
    assert [event.step for event in read(folder).Scalars("loss/train")] == list(range(1, LINES + 1))


def test_a_failed_save_leaves_no_part_of_itself(disk, folder):
    """The model's tensors have room, and the optimizer's have not."""
    checkpointer = AsyncCheckpointer(Checkpoints(folder), Retention(keep=1))
    checkpointer.start(lambda: checkpoint(1))
    checkpointer.wait()
    large = checkpoint(2)
    large.optimizer["head.weight"]["exp_avg"] = torch.zeros(20 * 2**18)
    checkpointer.start(lambda: large)
    checkpointer.wait()
    assert checkpointer.failure is not None and "No space left on device" in checkpointer.failure
    assert sorted(path.name for path in (disk.path / "run/checkpoints").iterdir()) == ["00001-000000", "base.safetensors"]
    disk.fill()
    checkpointer.start(lambda: checkpoint(3))
    checkpointer.wait()
    assert checkpointer.failure is not None
    disk.free()
    checkpointer.retry()
    assert Checkpoints(folder).newest()[0].name == "00003-000000"


def test_sigterm_asks_for_a_stop_on_a_full_disk(disk, folder):
    disk.fill()
    with stop_on_sigterm(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(folder, STOP_FILE)
    disk.free()
    folder.remove_file(STOP_FILE)
    disk.fill(inodes=True)
    with stop_on_sigterm(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert not folder.exists(STOP_FILE)
        disk.free()
        wait_for(folder, STOP_FILE)


def wait_for(folder: RunFolder, name: str) -> None:
    end = time.monotonic() + 120
    while not folder.exists(name):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("write", [lambda folder: write_end(folder, End("finished", 1, 1)), lambda f: f.write_settings(RUN)])
def test_what_must_be_there_raises_and_leaves_nothing(disk, folder, write):
    disk.fill()
    with pytest.raises(OSError, match="No space left on device"):
        write(folder)
    assert folder.list_files() == {}


RUN = settings(Path("x"), Path("x"), "x", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_a_disk_that_is_full_from_the_switch_on(disk, digits, undisturbed):
    """It trains to its end, is not finished, and says where it goes on; then it ends with an undisturbed one's bits."""
    run = settings(digits, disk.path, "run", 1, checkpoint={"every_steps": 4}, workers={"hang_seconds": 5.0})
    folder = RunFolder.of(run)

    def fill() -> None:
        wait_inside(folder, 1)
        disk.fill()

    threading.Thread(target=fill, daemon=True).start()
    with pytest.raises(TrainError, match=r"without .*end\.json.* the same command goes on from epoch") as error:
        train(run)
    newest = Checkpoints(folder).folder.list_folders()[-1]  # no part of a later one is there
    assert f"(checkpoint {newest})" in str(error.value)
    assert int(newest[:5]) < SWITCH
    assert not folder.exists("ranks.json")
    assert not folder.exists("result.json")
    disk.free()
    assert train(run)["epochs"] == EPOCHS
    plain = undisturbed(1)
    assert_same_bits(final(run), final(plain))
    assert folder.read_json("ranks.json") == RunFolder.of(plain).read_json("ranks.json")
    (Path(folder.path) / "result.json").unlink()
    disk.fill()
    with pytest.raises(
        TrainError, match=r"is trained, but has no result yet \(.*No space left.*\); the same command writes it"
    ):
        write_result(folder)
