"""What a trunk's windows come to, against the model's own weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prelora_ray.engine.step import TrainStep
from prelora_ray.method.convergence import Verdict
from prelora_ray.method.ranks import assign_ranks
from prelora_ray.method.targets import target_norms
from tests.engine.test_step import IDS, batch, settings, train_step
from window_meter import WindowMeter

FIXED = batch(np.arange(24))
ROWS = {"query": slice(0, 16), "key": slice(16, 32), "value": slice(32, 48)}


def train_window(step: TrainStep, meter: WindowMeter) -> tuple[Verdict, list[dict[str, torch.Tensor]]]:
    """Two epochs of one step each, and the weights behind each."""
    state, weights = step.state, []
    for _ in range(2):
        step.train(batch(IDS))
        meter.end_epoch()
        verdict = state.phases.end_epoch(state.epoch, target_norms(state.model, state.targets), 1.0).verdict
        state.epoch += 1
        weights.append(copy.deepcopy(state.model.state_dict()))
    return verdict, weights


def test_windows_of_a_trunk(tmp_path):
    step = train_step(settings(tmp_path, method={"enabled": False, "r_min": 2, "window_epochs": 2}))
    model, losses = step.state.model, [3.0]
    meter = WindowMeter(step, FIXED)
    verdict, (*_, old) = train_window(step, meter)
    first = meter.end_window(verdict, losses)
    assert (first["window"], first["epoch_end"], first["in_ramp"]) == (0, 2, False)
    assert first["recovery"] is None and first["norm_change"] is None and first["remaining_gain"] is None

    verdict, (between, now) = train_window(step, meter)
    moments = copy.deepcopy(step.state.optimizer.state_dict()["state"])
    second = meter.end_window(verdict, losses)
    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())
    for i, entry in step.state.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[i][key]) for key, value in entry.items())

    def loss(tensors: dict[str, torch.Tensor]) -> float:
        other = copy.deepcopy(model).eval()
        other.load_state_dict(tensors)
        return F.cross_entropy(other(step.task.normalize(FIXED.tensors["images"])), FIXED.tensors["labels"]).item()

    ranks = assign_ranks(verdict.module_change, 2, 8)
    assert len(set(ranks.values())) > 1
    recovered, cosines, slopes = copy.deepcopy(now), [], []
    for target in step.state.targets:
        name, rows = f"{target.stored_in}.weight", ROWS.get(target.family, slice(None))
        u, sigma, v = torch.linalg.svd((now[name] - old[name])[rows], full_matrices=False)
        rank = ranks[target.name]
        recovered[name][rows] = old[name][rows] + u[:, :rank] @ sigma[:rank].diag() @ v[:rank]
        path = (between[name] - old[name])[rows].norm() + (now[name] - between[name])[rows].norm()
        cosines.append((now[name] - old[name])[rows].norm() / path)
        squares = [torch.linalg.svdvals(tensors[name][rows]) ** 2 for tensors in (old, now)]
        before, after = (of.sum() / of[0] for of in squares)
        slopes.append((after - before).abs() / before)
    expected = [loss(old), loss(recovered), loss(now)]
    assert second["recovery_losses"] == pytest.approx(expected, rel=1e-9)
    assert second["recovery"] == pytest.approx((expected[0] - expected[1]) / (expected[0] - expected[2]), rel=1e-6)
    assert second["effective_perturbation"] == pytest.approx(np.mean(cosines))
    assert second["stable_rank_slope"] == pytest.approx(np.mean(slopes))
    assert second["norm_change"] == max(verdict.family_change.values())
    assert 0 < second["rate_left"] < first["rate_left"] < 1
