"""What `prelora train --dry-run` tells, refuses, and leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
from sklearn.datasets import load_digits

from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import DriverLock, HeldRunError
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.dry_run import dry_run
from tests.command import prelora_here
from tests.runs import EPOCHS, SWITCH, TINY_VIT


def content(folder: Path) -> dict[str, int]:
    """Files and folders below a folder, with the time of their last change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.usefixtures("ray_cluster")
def test_a_new_run_whose_images_are_not_prepared_yet(tmp_path):
    small = ["--set", f"model.options={json.dumps(TINY_VIT)}", "--set", "method.r_max=8"]
    command = ["train", "digits", "--dry-run", "--storage", f"{tmp_path}/runs", "--set", f"data.path={tmp_path}/data", *small]
    told = prelora_here(*command, "--json")
    assert told.returncode == 0, told.stderr
    run = json.loads(told.stdout)
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT)
    assert run["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert run["train_images"] + run["val_images"] == len(load_digits().images)
    assert (run["classes"], run["is_prepared"], run["checkpoint"], run["is_finished"]) == (10, False, None, False)
    assert 96 * (run["batches"] - 1) < run["train_images"] <= 96 * run["batches"]
    assert (run["epochs"], run["workers"], run["gpu"]) == (100, [2, 2], False)
    assert (run["switch_epoch"], run["first_verdict"]) == (None, 12)  # two windows of 3 behind the ramp's 4 epochs: 6 to 12
    plain = prelora_here(*command, "--set", "method.switch_epoch=30").stdout.splitlines()
    assert f"run {tmp_path}/runs/digits would begin" in plain
    assert f"100 epochs of {run['batches']} batches on 2 workers with no GPU" in plain
    assert plain[-2:] == ["switch after epoch 30, as the recipe says", "nothing was written"]
    assert content(tmp_path) == {}


def test_a_run_that_is_there_already(undisturbed, tmp_path):
    run = undisturbed(2)
    there = RunFolder(shutil.copytree(RunFolder.of(run).path, tmp_path / run.name))
    moved = run.model_copy(update={"storage": str(tmp_path)})
    before = content(tmp_path)
    assert dry_run(moved).is_finished
    gone = moved.model_copy(update={"data": moved.data.model_copy(update={"path": str(tmp_path / "gone")})})
    told = dry_run(gone)
    assert (told.is_finished, told.train_images, told.batches) == (True, None, None)  # as `train` then tells its result
    assert content(tmp_path) == before
    there.remove_file("result.json")
    *_, previous, last = Checkpoints(there).names()
    there.remove_folder(f"checkpoints/{last}")
    before = content(tmp_path)
    told = dry_run(moved)
    assert (told.checkpoint, told.epoch, told.epochs, told.is_finished) == (previous, int(previous[:5]), EPOCHS, False)
    assert told.switched_at == SWITCH
    assert content(tmp_path) == before
    with DriverLock(there), pytest.raises(HeldRunError, match=rf"{run.name} is being trained by process"):
        dry_run(moved)
    there.write_json("data.json", {**there.read_json("data.json"), "fingerprint": "other"})
    with pytest.raises(UserError, match=r"was begun with other images"):
        dry_run(moved)
    with pytest.raises(UserError, match=r"train\.seed = 9 is not allowed: run .* was begun with 5"):
        dry_run(moved.model_copy(update={"train": moved.train.model_copy(update={"seed": 9})}))
