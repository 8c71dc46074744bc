"""Runs of one process train as `prelora train` has them trained."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from prelora_ray.run_folder import RunFolder
from tests.command import ROOT
from tests.runs import SWITCH


@pytest.mark.slow
def test_a_run_and_its_fork_have_the_losses_of_a_run_under_ray(undisturbed, tmp_path):
    folder = RunFolder.of(undisturbed(1))
    plan = {
        "recipe": str(folder / "config.yaml"),
        "runs": [
            {"name": "trunk", "until": SWITCH, "set": ["method.enabled=false"]},
            {"name": "fork", "of": "trunk", "after": SWITCH},
        ],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, str(ROOT / "benchmarks" / "side_by_side.py"), str(tmp_path / "plan.yaml"), str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["run"] for line in lines] == ["trunk"] * SWITCH + ["fork"] * (len(lines) - SWITCH)
    found = [(line["epoch"], line["phase"], line["image_size"], line["loss"], line["top1"]) for line in lines]
    expected = [(line.epoch, line.phase, line.image_size, line.loss, line.val_top1) for line in folder.epochs()]
    assert [line[:3] for line in found] == [line[:3] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[3:] == pytest.approx(theirs[3:], rel=1e-12)
