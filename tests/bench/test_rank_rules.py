"""Rank rules at equal budget, against examples computed by hand."""

from __future__ import annotations

import random

import pytest
import torch

from prelora_ray.method.ranks import assign_ranks
from rank_rules import (
    Evidence,
    InputMoments,
    Limits,
    adapter_parameters,
    by_family,
    deal,
    eva,
    first_order,
    first_order_terms,
    gradient,
    mlp,
    spectral,
    squared_singular_values,
    uniform,
)

A, B = "blocks.0.attn.query", "blocks.1.attn.query"
TURN = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)


def limits(choices: list[int], budget: int, seed: int = 0) -> Limits:
    return Limits(choices, budget, "family", seed)


def evidence(sides: dict[str, int], change=None, moment=None, gradient=None, variance=None) -> Evidence:
    return Evidence(sides, change or {}, moment or {}, gradient or {}, variance or {})


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_the_next_rank_goes_where_it_is_worth_most_until_none_fits():
    sides = {A: 10, B: 5}
    # A 2 for 20, B 2 for 10, B 4 for 10: 15 of 55 are left, and A 4 takes 20.
    assert deal({A: [3, 1], B: [2, 2]}, sides, limits([2, 4], 55)) == {A: 2, B: 4}
    # What A does not take, B may.
    assert deal({A: [3, 1], B: [2, 0]}, sides, limits([2, 4], 45)) == {A: 2, B: 4}
    assert deal({A: [3, 1], B: [2, 0]}, sides, limits([2, 4], 50)) == {A: 4, B: 2}
    assert deal({B: [1], A: [1]}, sides, limits([2, 4], 25)) == {A: 0, B: 2}  # of equals, the first
    assert deal({A: [1]}, sides, limits([2, 4], 100)) == {A: 2, B: 0}
    assert deal({A: [], B: [1]}, sides, limits([2, 4], 100)) == {A: 0, B: 2}


def test_uniform_is_even_over_layers():
    sides = {f"blocks.{layer}.attn.{family}": 4 for layer in range(3) for family in ("query", "key", "value", "proj")}
    # Rank 2 for all takes 96 of 144; each step to 4 takes 8, so six modules have it.
    ranks = [uniform(sides, limits([2, 4, 8], 144, seed)) for seed in (0, 0, 1, 2)]
    for of in ranks:
        raised = [name for name, rank in of.items() if rank == 4]
        assert sorted(name.split(".")[1] for name in raised) == ["0", "0", "1", "1", "2", "2"]
        assert set(of.values()) == {2, 4} and list(of) == list(sides)
    assert ranks[0] == ranks[1] and len({str(of) for of in ranks}) == 3
    assert set(uniform(sides, limits([2, 4, 8], 10_000)).values()) == {8}
    # No module has twice the rank of another's next, even where nothing else fits: fc1 takes 12 for the step to 4.
    unequal = {"blocks.0.attn.query": 4, "blocks.0.mlp.fc1": 6, "blocks.0.mlp.fc2": 60}
    assert uniform(unequal, limits([2, 4, 8], 140 + 36)) == dict(zip(unequal, (4, 4, 2), strict=True))


def test_mlp_alone():
    sides = {"blocks.0.attn.query": 4, "blocks.0.mlp.fc1": 6, "blocks.0.mlp.fc2": 6}
    assert mlp(sides, limits([2, 4, 8], 50)) == dict(zip(sides, (0, 4, 4), strict=True))
    with pytest.raises(ValueError, match="fc1 and fc2"):
        mlp({A: 4}, limits([2], 50))


def test_gradients_go_through_the_papers_algorithm():
    names = [f"blocks.{i}.attn.query" for i in range(3)]
    found = evidence(dict.fromkeys(names, 1), gradient=dict(zip(names, (1.0, 2.0, 4.0), strict=True)))

    def ranks(budget: int) -> list[int]:
        return list(gradient(found, limits([1, 2, 4, 8], budget)).values())

    # n = 0, 1/3, 1, so 4 n - i = -1 ...; 1/3, -2/3 ...; 3, 2, 1 for i = 1, 2, 3.
    assert ranks(3) == [1, 1, 1]
    assert ranks(10) == [1, 1, 8]
    assert ranks(11) == [1, 2, 8] == list(assign_ranks(found.gradient, 1, 8).values())
    assert ranks(12) == [2, 2, 8]  # the second module's next takes 2
    assert ranks(13) == [1, 4, 8]


def test_gradients_at_the_papers_own_budget_have_its_ranks():
    drawn = random.Random(0)
    for _ in range(20):
        sides = {f"blocks.{i}.{family}": size for i in range(6) for family, size in (("attn.proj", 7), ("mlp.fc1", 17))}
        norms = {name: drawn.random() for name in sides}
        for normalize in ("family", "overall"):
            expected = assign_ranks(norms, 2, 16, normalize)
            allowed = Limits([2, 4, 8, 16], adapter_parameters(expected, sides), normalize, 0)
            assert gradient(evidence(sides, gradient=norms), allowed) == expected


def test_spectral_by_hand():
    # Squared singular values 9, 4, 1 over 7 and 4, 4 over 4: by parameter 1.29, 0.57, ... and 1, 1.
    turned = torch.block_diag(TURN, torch.eye(1, dtype=torch.float64))
    change = {A: turned @ torch.cat([diagonal(3, 2, 1), torch.zeros(3, 1)], dim=1), B: TURN @ diagonal(2, 2) @ TURN}
    found = evidence({A: 7, B: 4}, change)
    assert spectral(found, limits([1, 2], 7)) == {A: 1, B: 0}
    assert spectral(found, limits([1, 2], 15)) == {A: 1, B: 2}
    assert spectral(found, limits([1, 2], 21)) == {A: 1, B: 2}
    assert spectral(found, limits([1, 2], 22)) == {A: 2, B: 2}


def test_first_order_by_hand():
    moment = torch.tensor([[1.0, 5.0], [7.0, -4.0]], dtype=torch.float64)
    # sigma 3 and 2, <M, u v'> 1 and -4.
    assert first_order_terms(diagonal(3, 2), moment).tolist() == pytest.approx([8, 3])
    assert first_order_terms(TURN @ diagonal(3, 2), TURN @ moment).tolist() == pytest.approx([8, 3])
    found = evidence({A: 4, B: 4}, {A: diagonal(3, 2), B: diagonal(2, 1)}, {A: moment, B: diagonal(3, 1)})
    assert first_order(found, limits([1, 2], 8)) == {A: 1, B: 1}  # 8, then B's 6
    assert first_order(found, limits([1, 2], 12)) == {A: 2, B: 1}  # then A's 3, and not B's 1


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_spectra_are_those_of_a_singular_value_decomposition(shape):
    drawn = torch.Generator().manual_seed(0)
    change, moment = (torch.randn(*shape, dtype=torch.float64, generator=drawn) for _ in range(2))
    u, sigma, v = torch.linalg.svd(change, full_matrices=False)
    torch.testing.assert_close(squared_singular_values(change), sigma**2)
    expected = [float(s * (moment * (u[:, k : k + 1] @ v[k : k + 1])).sum().abs()) for k, s in enumerate(sigma)]
    assert first_order_terms(change, moment).tolist() == pytest.approx(sorted(expected, reverse=True))


def test_eva_by_hand():
    moments = InputMoments(2, torch.device("cpu"))
    for rows in ([[6, 5], [4, 5]], [[5, 7], [5, 3]]):  # around (5, 5): +-1 in the one, +-2 in the other
        moments.add(torch.tensor([rows], dtype=torch.float32))
    assert moments.variance().tolist() == pytest.approx([2, 0.5])
    # Shares 0.8, 0.2 over 4 and 0.75, 0.25 over 2.
    found = evidence({A: 4, B: 2}, variance={A: moments.variance(), B: torch.tensor([3.0, 1.0])})
    assert eva(found, limits([1, 2], 3)) == {A: 0, B: 1}
    assert eva(found, limits([1, 2], 8)) == {A: 1, B: 2}
    with pytest.raises(ValueError, match="linear layers alone"):
        eva(evidence({A: 4, B: 2}, variance={A: moments.variance()}), limits([1, 2], 8))


def test_a_rank_is_no_larger_than_a_weight_has():
    found = evidence({A: 4}, {A: diagonal(3, 2)})
    assert spectral(found, limits([1, 2, 4], 100)) == {A: 2}


def test_no_rule_spends_more_than_the_budget_and_all_come_near():
    drawn = torch.Generator().manual_seed(0)
    shapes = {f"blocks.{i}.{name}": shape for i in range(3) for name, shape in (("attn.proj", (8, 8)), ("mlp.fc1", (32, 8)))}
    sides = {name: sum(shape) for name, shape in shapes.items()}
    change, moment = (
        {name: torch.randn(*shape, dtype=torch.float64, generator=drawn) for name, shape in shapes.items()} for _ in range(2)
    )
    variance = {name: torch.rand(shape[1], generator=drawn).sort(descending=True).values for name, shape in shapes.items()}
    norms = {name: float(matrix.norm()) for name, matrix in moment.items()}
    found = evidence(sides, change, moment, norms, variance)
    for budget in range(400, 1200, 37):
        allowed = limits([2, 4, 8], budget)
        for rule in (gradient, spectral, first_order, eva):
            ranks = rule(found, allowed)
            left = budget - adapter_parameters(ranks, sides)
            assert left >= 0
            assert all(max(rank, 2) * sides[name] > left for name, rank in ranks.items() if rank < 8)  # the next step's


def test_ranks_by_family_and_layer():
    ranks = {"blocks.0.attn.query": 2, "blocks.0.mlp.fc1": 0, "blocks.1.attn.query": 4, "blocks.1.mlp.fc1": 8}
    assert by_family(ranks) == {"query": [2, 4], "fc1": [0, 8]}
