"""Criteria of a switch, against examples computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from switch_criteria import (
    AnnealingLaw,
    annealing_areas,
    effective_perturbation,
    fit_law,
    recovery_ratio,
    remaining_gain,
    stable_rank,
    stable_rank_slope,
    truncated,
)
from tests.bench.test_rank_rules import TURN, diagonal


def test_recovery():
    assert recovery_ratio(2.0, 1.7, 1.5) == pytest.approx(0.6)
    assert recovery_ratio(2.0, 2.1, 1.5) == pytest.approx(-0.2)
    assert recovery_ratio(2.0, 1.9, 2.0) is None


def test_truncated_by_hand():
    assert torch.allclose(truncated(TURN @ diagonal(3, 2), 1), TURN @ diagonal(3, 0))
    assert torch.equal(truncated(diagonal(3, 2), 0), diagonal(0, 0))
    assert torch.allclose(truncated(diagonal(3, 2), 8), diagonal(3, 2))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_truncated_is_the_leading_part_of_a_singular_value_decomposition(shape):
    change = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, sigma, v = torch.linalg.svd(change, full_matrices=False)
    torch.testing.assert_close(truncated(change, 2), u[:, :2] @ sigma[:2].diag() @ v[:2])
    assert truncated(change.float(), 2).dtype == torch.float32


def test_effective_perturbation():
    assert effective_perturbation(5, 3 + 4) == pytest.approx(5 / 7)  # (3, 0), then (0, 4)
    assert effective_perturbation(0, 0) == 0


def test_stable_rank():
    assert stable_rank(TURN @ diagonal(2, 1) @ TURN) == pytest.approx(5 / 4)
    assert stable_rank(torch.cat([diagonal(3, 3), torch.zeros(2, 4)], dim=1)) == pytest.approx(2)
    assert stable_rank_slope({"a": 2.0, "b": 4.0}, {"a": 3.0, "b": 3.0}) == pytest.approx(0.375)


def test_annealing_areas_by_hand():
    s1, s2 = annealing_areas([1, 2, 2, 1, 0.5], decay=0.5)
    assert s1.tolist() == [1, 3, 5, 6, 6.5]
    assert s2.tolist() == [0, 0, 0, 1, 2]  # momenta 0, 0, 0, 1, 0.5 + 0.5


def test_the_second_area_is_the_papers_double_sum():
    rates = [0.9**i for i in range(12)]
    pairs = [(i, k) for i in range(1, 12) for k in range(1, i + 1)]
    expected = sum((rates[k - 1] - rates[k]) * 0.999 ** (i - k) for i, k in pairs)
    assert annealing_areas(rates)[1][-1] == pytest.approx(expected)


def test_a_law_is_found_again():
    law = AnnealingLaw(1.5, 2.0, 0.4, 0.3)
    s1, s2 = np.linspace(0.5, 6, 12), np.linspace(0, 1, 12) ** 2
    found = fit_law([law.loss(*areas) for areas in zip(s1, s2, strict=True)], s1, s2)
    assert (found.l0, found.a, found.alpha, found.c) == pytest.approx((1.5, 2.0, 0.4, 0.3))
    assert law.loss(4.0, 0.5) == pytest.approx(1.5 + 2 / 4**0.4 - 0.15)
    assert fit_law([3, 2, 1, 1], s1[:4], s2[:4]) is None


def test_a_rate_that_has_not_fallen_says_nothing_of_its_fall():
    law = AnnealingLaw(1.5, 2.0, 0.4, 0.3)
    s1, s2 = np.linspace(0.5, 6, 12), np.zeros(12)
    found = fit_law([law.loss(*areas) for areas in zip(s1, s2, strict=True)], s1, s2)
    assert (found.l0, found.a, found.c) == pytest.approx((1.5, 2.0, 0))


def test_remaining_gain_is_that_of_the_law_that_made_the_losses():
    steps, epochs, done = 3, 12, 7
    rates = [0.5, *(1 + math.cos(math.pi * i / (steps * epochs)) for i in range(steps * epochs - 1))]
    areas = []
    for i in range(steps * epochs):
        falls = [max(0.0, rates[k - 1] - rates[k]) for k in range(1, i + 1)]
        before = areas[-1][1] if areas else 0.0
        areas.append((sum(rates[: i + 1]), before + sum(fall * 0.999 ** (i - k) for k, fall in enumerate(falls, 1))))
    law = AnnealingLaw(1.2, 1.0, 0.5, 0.01)
    means = np.array(areas).reshape(epochs, steps, 2).mean(1)
    losses = [9.0, *(law.loss(*means[epoch]) for epoch in range(1, done))]  # the ramp's is none of the law's
    now, end = (law.loss(*areas[i]) for i in (done * steps - 1, -1))
    assert remaining_gain(losses, rates, steps, 1) == pytest.approx((now - end) / now, rel=1e-4)
    assert remaining_gain(losses[:5], rates, steps, 1) is None
