"""Candidates for a criterion by which a run leaves full training, beside the paper's thresholds. Pure functions.

| criterion | a switch is due where it is | what it asks |
| --- | --- | --- |
| `recovery` | high | How much of the loss that the last window won could adapters of the rule's ranks have won? |
| `effective_perturbation` | low | Do a window's epochs go the same way? (Adaptive Parameter Freezing, ICDCS 2021) |
| `stable_rank_slope` | low | Do the weights' stable ranks still change? (Cuttlefish, arXiv 2305.02538) |
| `remaining_gain` | low | How much loss will the rest of the schedule win, by an annealing law? (arXiv 2408.11029) |
| `norm_change` | low | Do the weights' norms still change? The paper's own, the largest of the families', in percent |
| `rate_left` | low | How much of the learning rate's sum is left? It looks at nothing but the clock: the control |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from rank_rules import squared_singular_values, wide_of

Floats = NDArray[np.float64]

_ALPHAS = np.arange(1, 201) / 100
"""Powers among which the annealing law's is looked for."""
_FEWEST = 5
"""Epochs behind the ramp that the law is fitted to: it has four numbers."""


def recovery_ratio(before: float, recovered: float, now: float) -> float | None:
    """[L(before) - L(recovered)] / [L(before) - L(now)]: 1 where adapters could have won all that the window did.

    None where the window has won nothing.
    """
    return (before - recovered) / (before - now) if now < before else None


def truncated(change: torch.Tensor, rank: int) -> torch.Tensor:
    """The closest matrix of a rank to a change (out, in) of a weight, in its own number format."""
    wide = wide_of(change)
    u = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, len(wide) - min(rank, len(wide)) :]
    closest = u @ (u.T @ wide)
    return (closest if len(change) <= change.shape[1] else closest.T).to(change.dtype)


def effective_perturbation(change: float, steps: float) -> float:
    """|sum of dW_e| / sum of |dW_e| over the epochs of a window: 1 where all go the same way, 0 where they come back.

    `change`: norm of the whole change. `steps`: sum of the norms of each epoch's.
    """
    return change / steps if steps > 0 else 0.0


def stable_rank(weight: torch.Tensor) -> float:
    """|W|_F^2 / |W|_2^2, from 1 to the rank."""
    squares = squared_singular_values(weight)
    return float(squares.sum() / squares[0])


def stable_rank_slope(before: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Mean over the modules of how much the stable rank has changed over a window, up or down, as a share of itself."""
    return sum(abs(now[name] - rank) / rank for name, rank in before.items()) / len(before)


def annealing_areas(rates: Sequence[float], decay: float = 0.999) -> tuple[Floats, Floats]:
    """S1 and S2 (arXiv 2408.11029) behind each step, by the steps' learning rates.

    S1 is the sum of the rates. S2 is the sum, over the steps, of a momentum that decays by `decay` and takes in by how
    much the rate has fallen; where it has risen, as in the ramp, it takes in nothing.
    """
    momentum, momenta, last = 0.0, [], rates[0]
    for rate in rates:
        momentum = decay * momentum + max(0.0, last - rate)
        momenta.append(momentum)
        last = rate
    return np.cumsum(rates), np.cumsum(momenta)


@dataclass(frozen=True)
class AnnealingLaw:
    """L = L0 + A S1^-alpha - C S2 (arXiv 2408.11029)."""

    l0: float
    a: float
    alpha: float
    c: float

    def loss(self, s1: float, s2: float) -> float:
        return float(self.l0 + self.a * s1**-self.alpha - self.c * s2)


def fit_law(losses: Sequence[float], s1: Floats, s2: Floats) -> AnnealingLaw | None:
    """The law that is closest to losses in the mean square: L0, A and C are not negative, alpha is a hundredth up to 2.

    None where there are fewer than 5. As long as the rate has not fallen S2 is 0, and so is C: what the fall will win
    is not known then.
    """
    if len(losses) < _FEWEST:
        return None
    fits = [(nnls(np.stack([np.ones_like(s1), s1**-alpha, -s2], axis=1), np.asarray(losses)), alpha) for alpha in _ALPHAS]
    ((l0, a, c), _), alpha = min(fits, key=lambda fit: fit[0][1])
    return AnnealingLaw(float(l0), float(a), float(alpha), float(c))


def remaining_gain(losses: Sequence[float], rates: Sequence[float], steps: int, ramp_epochs: int) -> float | None:
    """The share of the present loss that the rest of the schedule will win, by the law as it fits the epochs so far.

    `losses`: mean training loss of each epoch so far. `rates`: of all steps of the run, `steps` to an epoch. The epochs
    of the ramp are left out. None where too few are left.
    """
    s1, s2 = annealing_areas(rates)
    means = [areas.reshape(-1, steps).mean(1)[ramp_epochs : len(losses)] for areas in (s1, s2)]
    law = fit_law(losses[ramp_epochs:], *means)
    if law is None:
        return None
    now, end = (law.loss(s1[i], s2[i]) for i in (len(losses) * steps - 1, -1))
    return (now - end) / now
