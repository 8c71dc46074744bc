"""Rules for the ranks of adapters, all at the budget that the paper's rule spends. Pure functions, in plain torch.

A rule gives each module a rank r of 0, r_min, 2 r_min, ..., r_max, so that the adapters' parameters, the sum of
r (in + out), are at most the budget. Most of them tell what each next rank is worth, and `deal` gives the ranks away,
the one that is worth most first, as long as there is budget.

| rule | what is worth most |
| --- | --- |
| `paper` | what `assign_ranks` gives by the norms' changes (arXiv 2509.21619, algorithm 2): the budget itself |
| `uniform` | the lowest rank; what is left goes to layers evenly, drawn by the run's seed |
| `mlp` | the same over fc1 and fc2 alone |
| `gradient` | as the paper's, by norms of gradients, which is what the authors' script goes by |
| `spectral` | the squares of dW's singular values, dW being the change of a weight over the last window |
| `first_order` | sigma_k abs(<M, u_k v_k'>) of dW's singular values and vectors, M being Adam's first moment of W |
| `eva` | the share of the variance of a layer's inputs that its directions explain (EVA, arXiv 2410.07170) |

`spectral`, `first_order` and `eva` count what a rank is worth by its parameters, and may leave a module without an
adapter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from prelora_ray.method.architecture import family_of, layers_of
from prelora_ray.method.ranks import Normalize

Ranks = dict[str, int]
"""Rank by module name."""
Worth = dict[str, list[float]]
"""By module name, what the first of the choices of a rank is worth, the step from there to the second, and so on."""


@dataclass(frozen=True)
class Evidence:
    """What rules go by, of the moment at which a fork leaves its trunk; all by module name, in the model's order."""

    sides: dict[str, int]
    """in + out: what one rank takes of the budget."""
    change: dict[str, torch.Tensor]
    """dW (out, in): what the weight has changed by over the last window."""
    moment: dict[str, torch.Tensor]
    """(out, in): the optimizer's first moment of the weight."""
    gradient: dict[str, float]
    """Norm of the mean gradient over a few batches."""
    variance: dict[str, torch.Tensor]
    """(in,): variance of the inputs along their principal directions, the largest first; of linear layers alone."""


@dataclass(frozen=True)
class Limits:
    """What ranks may be."""

    choices: list[int]
    """Powers of two, as from `rank_choices`."""
    budget: int
    """Most parameters of all adapters."""
    normalize: Normalize
    """As `assign_ranks` takes it."""
    seed: int


def adapter_parameters(ranks: Mapping[str, int], sides: Mapping[str, int]) -> int:
    """Sum of r (in + out)."""
    return sum(rank * sides[name] for name, rank in ranks.items())


def deal(worth: Worth, sides: Mapping[str, int], limits: Limits) -> Ranks:
    """Gives one module after another its next rank, always where that is worth most; of equals, the first in `worth`.

    A module whose next rank is more than what is left keeps the rank that it has. Those that `worth` leaves out get 0.
    """
    ranks, left = dict.fromkeys(sides, 0), limits.budget
    given = {name: 0 for name in worth if worth[name]}  # of those that may get more, how many of the choices they had
    while given:
        name = max(given, key=lambda name: worth[name][given[name]])
        rank = limits.choices[given[name]]
        price = (rank - ranks[name]) * sides[name]
        if price > left:
            del given[name]
            continue
        ranks[name], left = rank, left - price
        given[name] += 1
        if given[name] == len(worth[name]):
            del given[name]
    return ranks


def uniform(sides: Mapping[str, int], limits: Limits) -> Ranks:
    """The largest rank that all can have; what is left gives some the next one, as many in each layer, or one more."""
    whole = sum(rank * sum(sides.values()) <= limits.budget for rank in limits.choices)
    drawn = np.random.default_rng(limits.seed)
    layers: dict[int, list[str]] = {}
    for name, layer in layers_of(sides).items():
        layers.setdefault(layer, []).append(name)
    places = {}
    for place, layer in enumerate(drawn.permutation(list(layers))):
        places |= {str(name): (turn, place) for turn, name in enumerate(drawn.permutation(layers[layer]))}
    order = sorted(places, key=places.__getitem__)
    return deal({name: [-float(rank) for rank in limits.choices[: whole + 1]] for name in order}, sides, limits)


def mlp(sides: Mapping[str, int], limits: Limits) -> Ranks:
    """`uniform` over fc1 and fc2. Raises ValueError where the model has neither."""
    own = {name: side for name, side in sides.items() if family_of(name) in ("fc1", "fc2")}
    if not own:
        raise ValueError("rule mlp is for models with targets fc1 and fc2")
    return dict.fromkeys(sides, 0) | uniform(own, limits)


def gradient(evidence: Evidence, limits: Limits) -> Ranks:
    """The paper's algorithm over norms of gradients: min-max normalised, n is above i / |R| where the rank is to be at
    least the i-th of R, from 0. To meet the budget, all these limits move up or down alike."""
    groups: dict[str, list[str]] = {}
    for name in evidence.gradient:
        groups.setdefault(family_of(name) if limits.normalize == "family" else "", []).append(name)
    normalized = {}
    for names in groups.values():
        norms = [evidence.gradient[name] for name in names]
        low, high = min(norms), max(norms)
        normalized |= {name: (evidence.gradient[name] - low) / (high - low) if high > low else 0.0 for name in names}
    count = len(limits.choices)
    worth = {name: [math.inf, *(normalized[name] * count - i for i in range(1, count))] for name in evidence.sides}
    return deal(worth, evidence.sides, limits)


def spectral(evidence: Evidence, limits: Limits) -> Ranks:
    return _by_spectrum({name: squared_singular_values(change) for name, change in evidence.change.items()}, evidence, limits)


def first_order(evidence: Evidence, limits: Limits) -> Ranks:
    terms = {name: first_order_terms(change, evidence.moment[name]) for name, change in evidence.change.items()}
    return _by_spectrum(terms, evidence, limits)


def eva(evidence: Evidence, limits: Limits) -> Ranks:
    """Raises ValueError where the inputs of a module are not known."""
    if missing := [name for name in evidence.sides if name not in evidence.variance]:
        raise ValueError(f"rule eva is for linear layers alone, and {missing[0]!r} is in none")
    shares = {name: variance / variance.sum() for name, variance in evidence.variance.items()}
    return _by_spectrum(shares, evidence, limits)


def _by_spectrum(terms: Mapping[str, torch.Tensor], evidence: Evidence, limits: Limits) -> Ranks:
    """`terms`: what each further rank of a module brings, the largest first."""
    worth: Worth = {}
    for name, side in evidence.sides.items():
        brought = [0.0, *terms[name][: limits.choices[-1]].cumsum(0).tolist()]
        ladder = [0, *(rank for rank in limits.choices if rank < len(brought))]
        worth[name] = [
            (brought[after] - brought[before]) / ((after - before) * side) for before, after in itertools.pairwise(ladder)
        ]
    return deal(worth, evidence.sides, limits)


def squared_singular_values(change: torch.Tensor) -> torch.Tensor:
    """Of dW (out, in), the largest first: (min(out, in),), float64; as eigenvalues of the smaller Gram matrix."""
    return torch.linalg.eigvalsh(_gram(wide_of(change))).clamp(min=0).flip(0)


def first_order_terms(change: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """sigma_k abs(<M, u_k v_k'>) of dW and M (out, in), the largest first: (min(out, in),), float64.

    As sigma_k v_k = dW' u_k, that is abs(u_k' M dW' u_k).
    """
    wide, along = wide_of(change), moment.double() if len(change) <= change.shape[1] else moment.double().T
    u = torch.linalg.eigh(_gram(wide)).eigenvectors
    return ((u.T @ along) * (u.T @ wide)).sum(1).abs().sort(descending=True).values


def wide_of(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix or its transpose, whichever has no more rows than columns, in float64."""
    return matrix.double() if len(matrix) <= matrix.shape[1] else matrix.double().T


def _gram(wide: torch.Tensor) -> torch.Tensor:
    return wide @ wide.T


class InputMoments:
    """Sums over the inputs of a layer, for their variance along each of their principal directions."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._count = 0
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._products = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """(..., in): each row counts as one."""
        rows = inputs.detach().flatten(0, -2).double()
        self._count += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows

    def variance(self) -> torch.Tensor:
        """(in,): the largest first."""
        mean = self._sum / self._count
        return torch.linalg.eigvalsh(self._products / self._count - mean.outer(mean)).clamp(min=0).flip(0)


RULES: dict[str, Callable[[Evidence, Limits, Ranks], Ranks]] = {
    "paper": lambda evidence, limits, paper: paper,
    "uniform": lambda evidence, limits, paper: uniform(evidence.sides, limits),
    "mlp": lambda evidence, limits, paper: mlp(evidence.sides, limits),
    "gradient": lambda evidence, limits, paper: gradient(evidence, limits),
    "spectral": lambda evidence, limits, paper: spectral(evidence, limits),
    "first_order": lambda evidence, limits, paper: first_order(evidence, limits),
    "eva": lambda evidence, limits, paper: eva(evidence, limits),
}
"""By name; the last argument is what the paper's rule gives."""


def by_family(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    """Ranks of each family, by layer."""
    families: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        families.setdefault(family_of(name), []).append(rank)
    return families
