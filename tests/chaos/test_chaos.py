"""Nodes that go and come; and one fault of each kind. `make chaos` does several of all kinds, at random."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.chaos import plan, run_on_disk
from tests.chaos.faults import ANYTIME

ELSEWHERE = {"worker killed", "driver stopped", "two drivers at once"}
"""Tested in train/test_run.py and test_lock.py; outages in test_outage.py, other full disks in test_full_disk.py."""


@pytest.mark.slow
def test_a_run_whose_nodes_go_and_come_equals_one_on_three_workers(digits: Path, tmp_path: Path) -> None:
    """Its weights too, to 1e-5 in float64. A node goes with a notice and another one without."""
    faults = ["node drained", "node added", "raylet killed"]
    _, found = run_on_disk(tmp_path, digits, faults, random.Random(3), at_switch_and_end=False, plain_workers=3)
    assert found.sizes == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_fault_of_each_kind_changes_nothing(digits: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    faults = [kind for kind in plan(len(ANYTIME), rng) if kind not in ELSEWHERE]
    costs, _ = run_on_disk(tmp_path, digits, faults, rng, at_switch_and_end=False)
    assert {cost.phase for cost in costs} == {"full", "warmup", "lora"}
