"""A run that is made to fail is told so; one that is not stays unmentioned."""

from __future__ import annotations


def test_no_warmup_and_a_high_rate_are_told_and_so_is_a_uniform_pattern(grid):
    assert sorted(grid.entry("rash")["diagnosis"]) == ["insufficient_warmup", "uniform_ranks"]


def test_a_healthy_run_is_not_mentioned(grid):
    """Which has no warmup either."""
    assert grid.entry("without warmup")["diagnosis"] == []
