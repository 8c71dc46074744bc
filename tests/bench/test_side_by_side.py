"""Runs of one process train as `prelora train` has them trained."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from torch import nn

from criteria import CRITERIA
from prelora_ray.run_folder import RunFolder
from rank_rules import RULES
from side_by_side import read_plan
from tests.command import ROOT
from tests.runs import FREEZE, SWITCH, TINY_VIT, settings


def side_by_side(plan: dict[str, Any], folder: Path, status: int = 0) -> list[dict[str, Any]]:
    """The lines that a plan's runs leave; `status`: that the program ends with."""
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, str(ROOT / "benchmarks" / "side_by_side.py"), str(folder / "plan.yaml"), str(folder / "out")]
    assert subprocess.run(command, cwd=ROOT).returncode == status
    return [json.loads(line) for line in (folder / "out").read_text().splitlines()]


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
    lines = side_by_side(plan, tmp_path)
    assert [line["run"] for line in lines] == ["trunk"] * SWITCH + ["fork"] * (len(lines) - SWITCH)
    found = [(line["epoch"], line["phase"], line["image_size"], line["loss"], line["top1"]) for line in lines]
    expected = [(line.epoch, line.phase, line.image_size, line.loss, line.val_top1) for line in folder.epochs()]
    assert [line[:3] for line in found] == [line[:3] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[3:] == pytest.approx(theirs[3:], rel=1e-12)


@pytest.mark.slow
def test_forks_by_rules_of_ranks_of_a_trunk_with_criteria(digits, tmp_path):
    of, left = settings(digits, tmp_path, "rules", 1, method={"switch_epoch": SWITCH}), ["method.enabled=false"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(of.model_dump(mode="json", exclude_unset=True)))
    forks = [{"name": rule, "of": "trunk", "after": SWITCH, "rule": rule} for rule in RULES]
    plan = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "runs": [
            {"name": "alone", "until": SWITCH + 1, "set": left},
            {"name": "trunk", "until": SWITCH + 1, "set": left, "criteria": True},
            {"name": "plain", "of": "trunk", "after": SWITCH},
            *forks,
        ],
    }
    told = side_by_side(plan, tmp_path)
    windows, lines = ([line for line in told if ("window" in line) == is_window] for is_window in (True, False))
    runs = {name: [line for line in lines if line["run"] == name] for name in ("alone", "trunk", "plain", *RULES)}
    losses = {name: [line["loss"] for line in of_run] for name, of_run in runs.items()}
    assert losses["trunk"] == losses["alone"]  # what is measured of the trunk costs it nothing
    assert losses["paper"] == losses["plain"]
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT)
    total = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(layer.weight.numel() + len(layer.bias) for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
    sides = {"query": 32, "key": 32, "value": 32, "proj": 32, "fc1": 80, "fc2": 80}
    budget = runs["paper"][0]["adapter_parameters"]
    for rule in RULES:
        first, freeze = runs[rule][0], runs[rule][FREEZE - SWITCH]
        assert [line["phase"] for line in runs[rule]] == ["warmup"] * 2 + ["lora"] * 2
        assert {line["rule"] for line in runs[rule]} == {rule}
        spent = sum(sum(ranks) * sides[family] for family, ranks in first["ranks"].items())
        assert first["adapter_parameters"] == spent <= first["budget"] == budget
        assert all(rank in (0, 2, 4, 8) for ranks in first["ranks"].values() for rank in ranks)
        assert first["trainable"] == 1
        assert freeze["trainable"] == pytest.approx((total - frozen + spent) / (total + spent))
        assert math.isfinite(losses[rule][-1])
    assert len({json.dumps(runs[rule][0]["ranks"]) for rule in RULES}) == len(RULES)
    assert runs["mlp"][0]["ranks"]["query"] == [0, 0, 0]
    assert len({losses[rule][-1] for rule in RULES}) == len(RULES)
    assert [(line["run"], line["epoch_end"], line["in_ramp"]) for line in windows] == [
        ("trunk", end, end == 1) for end in range(1, SWITCH + 2)
    ]
    assert all({*CRITERIA} <= line.keys() for line in windows)
    assert all(line["recovery_losses"][2] == after["recovery_losses"][0] for line, after in itertools.pairwise(windows))
    assert [line.get("of") for line in (runs["alone"][0], runs["trunk"][0], runs["plain"][0])] == [None, None, "trunk"]


@pytest.mark.slow
def test_a_run_that_is_not_finite_ends_with_its_forks_alone(digits, tmp_path):
    of = settings(digits, tmp_path, "wild", 1, method={"switch_epoch": SWITCH})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(of.model_dump(mode="json", exclude_unset=True)))
    wild = ["method.enabled=false", "train.learning_rate=1e30"]
    runs = [
        {"name": "wild", "set": wild},
        {"name": "fork", "of": "wild", "after": SWITCH},
        {"name": "tame", "until": 1, "set": ["method.enabled=false"]},
    ]
    lines = side_by_side({"recipe": str(tmp_path / "recipe.yaml"), "runs": runs}, tmp_path, status=1)
    assert [line["run"] for line in lines] == ["wild", "fork", "tame"]
    assert "the loss is not finite at step" in lines[0]["error"]
    assert lines[1]["error"] == "wild came to no end"
    assert math.isfinite(lines[2]["loss"])


@pytest.mark.parametrize(
    ("fork", "message"),
    [
        ({"criteria": True}, "is no full training from its first epoch on"),
        ({"rule": "best"}, "has rule best: known are paper, uniform"),
        ({"rule": "mlp", "set": ["method.enabled=false"]}, "is no fork that switches"),
        (
            {"rule": "mlp", "set": ["method.window_epochs=9", "method.rank_pattern={.*: 4}"]},
            "in front of the end of its first window",
        ),
    ],
)
def test_what_a_plan_may_not_have(digits, tmp_path, fork, message):
    of = settings(digits, tmp_path, "rules", 1, method={"switch_epoch": SWITCH})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(of.model_dump(mode="json", exclude_unset=True)))
    runs = [{"name": "trunk", "set": ["method.enabled=false"]}, {"name": "fork", "of": "trunk", "after": SWITCH, **fork}]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"recipe": str(tmp_path / "recipe.yaml"), "runs": runs}))
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.yaml")
