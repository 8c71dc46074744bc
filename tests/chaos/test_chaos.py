"""One fault of each kind that no other test does to a run; `make chaos` does several of all kinds, at random."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.chaos import plan, run_on_disk
from tests.chaos.faults import ANYTIME

ELSEWHERE = {"worker killed", "driver stopped", "two drivers at once"}
"""Tested in train/test_run.py and test_lock.py; outages in test_outage.py, other full disks in test_full_disk.py."""


@pytest.mark.timeout(900)
def test_one_fault_of_each_kind_changes_nothing(digits: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    faults = [kind for kind in plan(len(ANYTIME), rng) if kind not in ELSEWHERE]
    costs, _ = run_on_disk(tmp_path, digits, faults, rng, at_switch_and_end=False)
    assert {cost.phase for cost in costs} == {"full", "warmup", "lora"}
