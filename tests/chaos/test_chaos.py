"""One fault of each kind; `make chaos` does several, at random."""

from __future__ import annotations

import random
from pathlib import Path

from tests.chaos.chaos import plan, run
from tests.chaos.faults import FAULTS


def test_one_fault_of_each_kind_changes_nothing(digits: Path, tmp_path: Path) -> None:
    rng = random.Random(25)
    costs, _ = run(tmp_path, digits, plan(len(FAULTS), rng), rng)
    assert {cost.phase for cost in costs} == {"full", "warmup", "lora"}
