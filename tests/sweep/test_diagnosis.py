"""A run that is made to fail is told so; one that is not stays unmentioned."""

from __future__ import annotations

from prelora_ray.records import Diagnosis
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import train
from tests.runs import settings

LEARNS_FAST = {
    "model": {"options": {"patch_size": 2, "embed_dim": 48, "depth": 3, "num_heads": 3}, "drop_path": 0},
    "augment": {"mixup": 0, "cutmix": 0},
    "train": {"learning_rate": 5e-3, "resolution": []},
}
"""So that its loss has somewhere to jump from, with images of one size."""


def test_no_warmup_and_a_high_rate_are_told_and_so_is_a_uniform_pattern(digits, storage):
    when = {"switch_epoch": 5, "warmup_epochs": 0, "rank_pattern": {".*": 4}}
    rash = {"adapter_learning_rate_scale": 100, "adapter_ramp_steps": 0}
    run = settings(digits, storage, "rash", 1, method={**when, **rash}, **LEARNS_FAST)
    train(run)
    found = [event.signature for event in RunFolder.of(run).events() if isinstance(event, Diagnosis)]
    assert sorted(found) == ["insufficient_warmup", "uniform_ranks"]


def test_a_healthy_run_is_not_mentioned(grid):
    """Which has no warmup either."""
    assert grid.entry("without warmup")["diagnosis"] == []
