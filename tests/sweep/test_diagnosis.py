"""Runs that are made to fail are told so; one that is not stays unmentioned."""

from __future__ import annotations

import pytest

from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import train
from tests.runs import settings

MODEL = {"options": {"patch_size": 2, "embed_dim": 48, "depth": 3, "num_heads": 3}, "drop_path": 0}


@pytest.fixture
def diagnosed(digits, storage):
    """Signatures that a run shows which learns fast, and switches and freezes after epoch 5 of 7."""

    def diagnosed(name: str, **method) -> list[str]:
        method = {"switch_epoch": 5, "warmup_epochs": 0, "r_min": 2, "r_max": 8, **method}
        learning = {"augment": {"mixup": 0, "cutmix": 0}, "train": {"learning_rate": 5e-3, "resolution": []}, "model": MODEL}
        run = settings(digits, storage, name, 1, method=method, **learning)
        train(run)
        events = RunFolder.of(run).read_lines("events.jsonl")
        return [line["signature"] for line in events if line["event"] == "diagnosis"]

    return diagnosed


@pytest.mark.slow
def test_no_warmup_with_a_high_rate_and_a_uniform_pattern_are_told(diagnosed):
    rash = {"adapter_learning_rate_scale": 100, "adapter_ramp_steps": 0}
    assert sorted(diagnosed("rash", rank_pattern={".*": 4}, **rash)) == ["insufficient_warmup", "uniform_ranks"]


@pytest.mark.slow
def test_a_healthy_run_is_not_mentioned(diagnosed):
    assert diagnosed("healthy") == []
