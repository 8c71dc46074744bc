"""Criteria compared over lines made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from criteria import CRITERIA, compare, read_trunks
from tests.command import ROOT


def trunk(name: str = "trunk", windows: tuple[dict, ...] = (), top1: float = 0.9, seed: int = 0) -> list[dict]:
    """Of 12 epochs, with a window every 3; what is not given of one is 0.5."""
    epochs = [{"run": name, "seed": seed, "epoch": epoch, "loss": 1.0, "top1": top1} for epoch in range(12)]
    of_windows = [
        {"run": name, "seed": seed, "window": i, "epoch_end": 3 * i + 3, "in_ramp": i == 0} | dict.fromkeys(CRITERIA, 0.5) | own
        for i, own in enumerate(windows)
    ]
    return epochs + of_windows


def fork(after: int, top1: float, loss: float, of: str = "trunk", seed: int = 0) -> list[dict]:
    start = {"run": f"{of}-{after}", "of": of, "seed": seed, "epoch": after, "loss": 2.0, "top1": 0.5}
    return [start, start | {"epoch": 11, "loss": loss, "top1": top1}]


WINDOWS = (
    {"recovery": None, "rate_left": 0.9},
    {"recovery": 0.2, "rate_left": 0.6},
    {"recovery": 0.5, "rate_left": 0.3},
    {"recovery": 0.4, "rate_left": 0.1},
)
LINES = [*trunk(windows=WINDOWS), *fork(3, 0.80, 1.3), *fork(6, 0.85, 1.2), *fork(10, 0.89, 1.0), *fork(9, 0.88, 1.1)]


def lines_of(files: list[list[dict]], **bounds: float) -> dict[tuple[str, str], dict]:
    return {(line["criterion"], line["trunk"]): line for line in compare(read_trunks(files), bounds)}


def test_correlations_by_hand():
    found = lines_of([LINES])
    # Lost are 10, 5, 1 and 2 points where 0.9, 0.6, 0.3 and 0.3 of the rate are left, the fork after 10 going by the
    # window that ended with 9: ranks 4, 3, 1.5, 1.5 and 4, 3, 1, 2, whose correlation is 4.5 / sqrt(4.5 x 5).
    rate = found["rate_left", "trunk"]
    assert rate == {"criterion": "rate_left", "trunk": "trunk", "seed": 0, "forks": 4, "top1_lost": 0.9487, "loss_more": 0.9487}
    # Of recovery one is null: ranks 1, 2.5, 2.5 against 3, 1, 2.
    assert found["recovery", "trunk"]["forks"] == 3
    assert found["recovery", "trunk"]["top1_lost"] == pytest.approx(-0.8660)
    assert found["norm_change", "trunk"]["top1_lost"] is None  # all are alike


def test_forks_with_a_rule_of_ranks_or_an_error_are_left_out():
    by_rule = [line | {"run": "eva", "rule": "eva"} for line in fork(6, 0.1, 9.0)]
    broken = [*(line | {"run": "broken"} for line in fork(6, 0.1, 9.0)[:1]), {"run": "broken", "seed": 0, "error": "inf"}]
    assert lines_of([[*LINES, *by_rule, *broken]]) == lines_of([LINES])


def test_all_trunks_as_one():
    other = [*trunk("other", WINDOWS, top1=0.7), *fork(6, 0.5, 2.0, "other"), *fork(9, 0.69, 2.1, "other")]
    found = lines_of([LINES, other])
    assert found["rate_left", "other"]["top1_lost"] is None  # of two
    assert found["rate_left", "all"]["forks"] == 6
    # Points 10, 5, 1, 2, 20, 1 are ranks 5, 4, 1.5, 3, 6, 1.5, and rates 6, 4.5, 2, 2, 4.5, 2: 13.5 / sqrt(15 x 17).
    assert found["rate_left", "all"]["top1_lost"] == 0.8454


def test_a_fork_is_of_its_trunks_seed():
    other = [*trunk(windows=WINDOWS, seed=1, top1=0.5), *fork(6, 0.4, 2.0, seed=1)]
    found = [line for line in compare(read_trunks([LINES + other]), {}) if line["criterion"] == "rate_left"]
    assert [(line.get("seed"), line["forks"]) for line in found] == [(0, 4), (1, 1), (None, 5)]


def test_the_switch_of_a_bound():
    found = lines_of([LINES], rate_left=0.6, recovery=0.45, stable_rank_slope=0.1, effective_perturbation=0.5)
    chosen = {name: {key: found[name, "trunk"].get(key) for key in ("switch", "switch_top1_lost")} for name in CRITERIA}
    assert chosen["rate_left"] == {"switch": 6, "switch_top1_lost": pytest.approx(5)}
    assert chosen["recovery"] == {"switch": 9, "switch_top1_lost": pytest.approx(2)}
    assert chosen["stable_rank_slope"] == {"switch": None, "switch_top1_lost": None}
    assert chosen["effective_perturbation"]["switch"] == 6  # the first window is in the ramp
    assert "bound" not in found["norm_change", "trunk"]
    assert lines_of([LINES], rate_left=0.1)["rate_left", "trunk"]["switch"] == 12  # where no fork is
    assert "switch_top1_lost" not in lines_of([LINES], rate_left=0.1)["rate_left", "trunk"]


def test_forks_that_cannot_be_compared():
    short = [line for line in LINES if line["run"] != "trunk" or line.get("epoch") != 11]
    with pytest.raises(ValueError, match="trunk-3 ends with epoch 11, and trunk with epoch 10"):
        read_trunks([short])
    with pytest.raises(ValueError, match="trunk-2 leaves trunk after 2 epochs, before its first window is over"):
        read_trunks([[*trunk(windows=WINDOWS), *fork(2, 0.8, 1.0)]])


def test_the_command(tmp_path: Path):
    (tmp_path / "out").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    command = [sys.executable, str(ROOT / "benchmarks" / "criteria.py"), str(tmp_path / "out"), "--bound"]
    done = subprocess.run([*command, "rate_left=0.6"], capture_output=True, text=True, check=True)
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == list(compare(read_trunks([LINES]), {"rate_left": 0.6}))
    refused = subprocess.run([*command, "loss=1"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "loss=1" in refused.stderr
