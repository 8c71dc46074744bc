"""One fault of each kind that no other test does to a run; `make chaos` does several of all kinds, at random."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.chaos import plan, run
from tests.chaos.faults import FAULTS

ELSEWHERE = {"worker killed", "driver stopped"}
"""In tests/train/test_run.py."""


@pytest.mark.timeout(900)
def test_one_fault_of_each_kind_changes_nothing(digits: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    faults = [kind for kind in plan(len(FAULTS), rng) if kind not in ELSEWHERE]
    costs, _ = run(tmp_path, digits, faults, rng)
    assert {cost.phase for cost in costs} == {"full", "warmup", "lora"}
