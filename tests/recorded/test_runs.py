"""The list of runs, of a storage that holds one in each state."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prelora_ray import __version__
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.end import End, write_end
from prelora_ray.fault_tolerance.lock import DriverLock
from prelora_ray.recorded.runs import RunState, list_runs
from prelora_ray.records import EpochLine, Event, Progress, to_json
from prelora_ray.run_folder import RunFolder
from tests.command import prelora_here
from tests.lines import epoch_line, event, progress
from tests.runs import EPOCHS, settings


def make_run(storage: str | Path, name: str) -> RunFolder:
    """Three of seven epochs, with one restart."""
    run = settings(Path("x"), Path("x"), name, 1).model_copy(update={"storage": str(storage)})
    folder = RunFolder.of(run)
    folder.write_settings(run)
    folder.write_records(EpochLine, [epoch_line(epoch, val_top1=0.25 * epoch) for epoch in range(3)])
    begun = [event("run_started", world_size=1), event("restart", 2, attempt=1, cause="failure", world_size=1, phase="warmup")]
    folder.write_records(Event, begun)
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    for name in ("done", "died", "failing", "stopped", "begun", "busy", "broken"):
        make_run(tmp_path, name)
    RunFolder(tmp_path / "done").write_json("result.json", {})
    write_end(RunFolder(tmp_path / "failing"), End("failed", message="the loss is not finite"))
    write_end(RunFolder(tmp_path / "stopped"), End("stop", 3, 45))
    (tmp_path / "broken" / "config.yaml").write_text("- no\n")
    (tmp_path / "died" / "driver-0.json").write_text('{"pid": 1, "host": "elsewhere", "holds": true, "time": 1.0}')
    (tmp_path / "a folder of something else").mkdir()
    with DriverLock(RunFolder(tmp_path / "begun")), DriverLock(RunFolder(tmp_path / "busy")):
        RunFolder(tmp_path / "begun").write_starting("place the workers")
        RunFolder(tmp_path / "busy").write_json(Progress.FILE, to_json(progress(3)))
        yield tmp_path


def test_every_state_is_told(storage):
    assert {run.name: (run.state, run.message) for run in list_runs(str(storage)) if run.name != "broken"} == {
        "begun": ("starting", "place the workers"),
        "busy": ("training", None),
        "died": ("interrupted", None),
        "done": ("finished", None),
        "failing": ("failed", "the loss is not finite"),
        "stopped": ("stopped", None),
    }
    broken = next(run for run in list_runs(str(storage)) if run.name == "broken")
    assert broken.state == "damaged" and "config.yaml is damaged" in broken.message


def test_how_far_it_is_is_told(storage):
    (run,) = [run for run in list_runs(str(storage)) if run.name == "stopped"]
    assert run == RunState("stopped", "stopped", "warmup", 3, EPOCHS, 0.5, restarts=1, time=0.0)


def test_the_command_lists_them(storage):
    told = prelora_here("runs", str(storage))
    assert told.returncode == 0, told.stderr
    (line,) = [line for line in told.stdout.splitlines() if " failing " in line]
    for cell in ("failed", "warmup", "3 of 7", "50.0%", "the loss is not finite", "days ago"):
        assert cell in line
    assert told.stdout.startswith(f"7 runs in {storage}")
    content = json.loads(prelora_here("runs", str(storage), "--json").stdout)
    assert content["storage"] == str(storage)
    assert [run["name"] for run in content["runs"]] == ["begun", "broken", "busy", "died", "done", "failing", "stopped"]
    assert content["runs"][0]["time"] == pytest.approx(time.time(), abs=600)


def test_runs_in_a_bucket_are_listed(bucket):
    make_run(f"{bucket}/listed", "far")
    assert [(run.name, run.state, run.epoch) for run in list_runs(f"{bucket}/listed")] == [("far", "interrupted", 3)]


def test_what_is_no_storage_is_told(storage):
    with pytest.raises(UserError, match="is no folder: give the one that holds run folders"):
        list_runs(str(storage / "nowhere"))
    with pytest.raises(UserError, match="is a run folder: give the folder that it lies in"):
        list_runs(str(storage / "done"))


def test_the_version_is_told():
    told = prelora_here("--version")
    assert (told.returncode, told.stdout) == (0, f"prelora {__version__}\n")
