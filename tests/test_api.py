"""The package's functions: what importing them costs, and that they are what the commands go by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import prelora_ray
from prelora_ray.config import with_absolute_paths
from prelora_ray.config_file import load_settings
from prelora_ray.errors import UserError
from prelora_ray.method.convergence import percent_change
from prelora_ray.records import Result, to_json
from prelora_ray.run_folder import RunFolder
from tests.command import ROOT

DIGITS = ROOT / "jobs/configs/digits.yaml"
BY_PHASE = ("images_per_second", "peak_memory_bytes", "trainable_fraction")
RESULT = to_json(
    Result(
        epochs=12, switch_epoch=3, freeze_epoch=5, val_top1=0.9, best_val_top1=0.9, ranks={"8": 1}, restarts=0, seconds=1.0,
        **{key: {"full": 1} for key in BY_PHASE},
    )
)  # fmt: skip
IMPORT = """
import sys
import prelora_ray

print(*sorted({"numpy", "ray", "torch"} & sys.modules.keys()), ".")
for function in (prelora_ray.load, prelora_ray.replay, lambda source: prelora_ray.export(source, "out")):
    try:
        function("nowhere")
    except ValueError:
        pass
print("torch" in sys.modules, "ray" in sys.modules)
import prelora_ray.train.run
print("ray" in sys.modules, prelora_ray.train.__module__)
"""


def test_importing_it_is_cheap_and_knows_no_ray_before_it_trains_or_evaluates():
    """And `train` stays the function, though a package has its name."""
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.splitlines() == [".", "True False", "True prelora_ray.api"], run.stderr


def finished_run(storage: Path) -> None:
    """A run of the digits' recipe with other settings; training it again returns its result, which is `RESULT`."""
    overrides = ["train.epochs=12", "train.betas=[0.8, 0.9]", "method.r_max=16", f"data.path={storage}/data"]
    settings = with_absolute_paths(load_settings(DIGITS, overrides, name="mine", storage=str(storage)))
    folder = RunFolder.of(settings)
    folder.write_settings(settings)
    folder.write_json("result.json", RESULT)


def test_changes_are_sections_or_single_keys(tmp_path):
    finished_run(tmp_path)
    place = {"name": "mine", "storage": tmp_path, "data": {"path": tmp_path / "data"}}
    result = prelora_ray.train(DIGITS, train={"epochs": 12, "betas": (0.8, 0.9)}, **place, **{"method.r_max": 16})
    assert result == {**RESULT, "path": str(tmp_path / "mine")}
    given = ["train.epochs=12", "train.betas=[0.8, 0.9]"]
    assert prelora_ray.train(str(DIGITS), given, method={"r_max": 16}, **place) == result
    with pytest.raises(UserError, match=r"train\.epochs = 10 is not allowed: run .*mine was begun with 12"):
        prelora_ray.train(DIGITS, given, **place, **{"method.r_max": 16, "train.epochs": 10})
    with pytest.raises(UserError, match=r"train\.epoch = 8 is not allowed: there is no such key, did you mean train\.epochs"):
        prelora_ray.train(DIGITS, train={"epoch": 8})


def record(folder: Path, method: str) -> Path:
    """A run of six epochs, whose norms move by 8, 4, 2, ... percent an epoch and twice that, its loss by half of it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"name: run\ndata: {{path: x}}\nmethod: {method}\n")
    norm, loss = [10.0, 20.0], 2.0
    with (folder / "norms.jsonl").open("w") as file:
        for epoch in range(6):
            norms = dict(zip(("blocks.0.attn.query", "blocks.1.attn.query"), norm, strict=True))
            file.write(json.dumps({"attempt": 0, "epoch": epoch, "phase": "full", "loss": loss, "norms": norms}) + "\n")
            step = 0.08 / 2**epoch
            norm, loss = [norm[0] * (1 + step), norm[1] * (1 - 2 * step)], loss * (1 - step / 2)
    return folder


def test_replay_takes_keys_of_the_method_in_place_of_the_runs_own(tmp_path):
    """With windows of one epoch, step s changes the norms by 12 / 2^(s-1) percent in the mean: steps 3 and 4 are the
    first two below 4, so a test of three windows switches after 5 epochs. Another test lets go of a forced switch, and
    other ranks of given ones."""
    assert percent_change(10, 10.8) == pytest.approx(8)
    given = "{switch_epoch: 2, window_epochs: 1, r_min: 4, r_max: 16, rank_pattern: {'query': 8}}"
    run = record(tmp_path / "run", given)
    assert prelora_ray.replay(run).switch_epoch == 2
    assert prelora_ray.replay(run).ranks == dict.fromkeys(["blocks.0.attn.query", "blocks.1.attn.query"], 8)
    other_test = prelora_ray.replay(run, tau=4, zeta=5, ramp_epochs=0)
    assert (other_test.switch_epoch, other_test.ranks) == (5, prelora_ray.replay(run).ranks)
    other_ranks = prelora_ray.replay(run, r_max=8)
    assert (other_ranks.switch_epoch, other_ranks.ranks) == (2, {"blocks.0.attn.query": 4, "blocks.1.attn.query": 8})
    both = prelora_ray.replay(run, tau=4, switch_epoch=3)
    assert both.switch_epoch == 3
    with pytest.raises(UserError, match=r"method\.taw = 1 is not allowed: there is no such key"):
        prelora_ray.replay(run, taw=1)
