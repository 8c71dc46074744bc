"""Measures the criteria of `switch_criteria.py` on a trunk, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evidence import Weights, weights_of
from prelora_ray.data.batch import Batch
from prelora_ray.engine.optim import learning_rate, rates_left
from prelora_ray.engine.precision import autocast
from prelora_ray.engine.step import TrainStep
from prelora_ray.method.convergence import Verdict
from prelora_ray.schedule import ranks_for
from switch_criteria import (
    effective_perturbation,
    recovery_ratio,
    remaining_gain,
    stable_rank,
    stable_rank_slope,
    truncated,
)


class WindowMeter:
    """Follows a trunk from its first epoch on, and changes nothing of it.

    L is the mean cross entropy of `images`, training images as evaluation takes them, in phase full's model without
    drop path and in float32. A window that adapters would have trained is the model as it is, with W_old + P_r dW in
    place of each target module's weight: all else, such as norms and the head, trains in phase lora too.
    """

    def __init__(self, step: TrainStep, images: Batch) -> None:
        self._step = step
        self._images = images
        self._rates = [
            learning_rate(step.state.settings, i, step.state.batches)
            for i in range(step.state.settings.train.epochs * step.state.batches)
        ]
        self._begin(weights_of(step.state))

    def _begin(self, weights: Weights, ranks: dict[str, float] | None = None, loss: float | None = None) -> None:
        """`ranks`: stable ranks of the weights."""
        self._old = self._last = weights
        self._stable_ranks = ranks or {name: stable_rank(weight) for name, weight in weights.items()}
        self._loss = self._evaluated() if loss is None else loss
        self._path = dict.fromkeys(weights, 0.0)

    def end_epoch(self) -> None:
        weights = weights_of(self._step.state)
        for name, length in _lengths(weights, self._last).items():
            self._path[name] += length
        self._last = weights

    def end_window(self, verdict: Verdict, losses: Sequence[float]) -> dict[str, Any]:
        """What the window that ends now comes to. `losses`: mean training loss of each epoch so far."""
        state = self._step.state
        settings, now = state.settings, self._last
        stable_ranks = {name: stable_rank(weight) for name, weight in now.items()}
        changes = _lengths(now, self._old)
        perturbations = [effective_perturbation(changes[name], steps) for name, steps in self._path.items()]
        loss, recovered = self._evaluated(), None
        if verdict.module_change is not None:
            recovered = self._recovered(ranks_for(settings.method, verdict.module_change, list(now)))
        told = {
            "window": verdict.window.index,
            "epoch_end": verdict.window.epoch_end,
            "in_ramp": verdict.window.epoch_end - settings.method.window_epochs < settings.train.ramp_epochs,
            "norm_change": max(verdict.family_change.values()) if verdict.family_change is not None else None,
            "recovery": recovery_ratio(self._loss, recovered, loss) if recovered is not None else None,
            "recovery_losses": [self._loss, recovered, loss],
            "effective_perturbation": sum(perturbations) / len(perturbations),
            "stable_rank_slope": stable_rank_slope(self._stable_ranks, stable_ranks),
            "remaining_gain": remaining_gain(losses, self._rates, state.batches, settings.train.ramp_epochs),
            "rate_left": rates_left(settings)[verdict.window.epoch_end],
        }
        self._begin(now, stable_ranks, loss)
        return told

    def _recovered(self, ranks: dict[str, int]) -> float:
        """L where the window has changed each weight along its change's leading directions alone."""
        self._set({name: old + truncated(self._last[name] - old, ranks[name]) for name, old in self._old.items()})
        loss = self._evaluated()
        self._set(self._last)
        return loss

    @torch.no_grad()
    def _set(self, weights: Weights) -> None:
        for target in self._step.state.targets:
            rows = self._step.state.model.get_parameter(f"{target.stored_in}.weight")[target.start : target.stop]
            rows.copy_(weights[target.name].view_as(rows))

    def _evaluated(self) -> float:
        step = self._step
        state = step.state
        state.model.eval()
        state.refresh()
        evaluator = step.task.evaluator(state.device)
        with torch.compiler.set_stance("force_eager"), autocast("fp32", state.device):
            for _ in evaluator.run(state.model, [self._images], step.micro_batch):
                pass
        return evaluator.result(evaluator.sums).loss


def _lengths(weights: Weights, others: Weights) -> dict[str, float]:
    """Norm of each weight's difference."""
    norms = torch.stack([(weight - others[name]).norm() for name, weight in weights.items()]).tolist()
    return dict(zip(weights, norms, strict=True))
