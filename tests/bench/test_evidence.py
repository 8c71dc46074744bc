"""What is measured of a trunk, against the model's own weights, gradients and inputs."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F

from evidence import evidence_of, weights_of
from tests.engine.test_step import IDS, batch, settings, train_step


def test_evidence_of_a_step(tmp_path):
    step = train_step(settings(tmp_path))
    model, optimizer = step.state.model, step.state.optimizer
    before = weights_of(step.state)
    old = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step.train(batch(IDS))
    new, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    measured = [batch(ids) for ids in (IDS, np.roll(IDS, 5))]

    found = evidence_of(step, before, measured)

    # Nothing has changed, and nothing is left.
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items())
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][i][key]) for key, value in entry.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())

    assert list(found.sides.items())[:6] == [
        *((f"blocks.0.attn.{name}", 32) for name in ("query", "key", "value", "proj")),
        *((f"blocks.0.mlp.{name}", 80) for name in ("fc1", "fc2")),
    ]
    rows = {"query": slice(0, 16), "key": slice(16, 32), "value": slice(32, 48)}
    model.zero_grad()
    inputs: dict[str, list[torch.Tensor]] = {}
    for name in ("blocks.1.attn.qkv", "blocks.1.mlp.fc2"):
        kept = inputs[name] = []
        model.get_submodule(name).register_forward_hook(lambda _, given, __, kept=kept: kept.append(given[0]))
    for of in measured:
        logits = model(step.task.normalize(of.tensors["images"]))
        (F.cross_entropy(logits, of.tensors["labels"], ignore_index=-1) / 2).backward()
    rows_of = {name: torch.cat([given.detach().flatten(0, 1) for given in each]) for name, each in inputs.items()}
    families = {**dict.fromkeys(rows, "blocks.1.attn.qkv"), "fc2": "blocks.1.mlp.fc2"}
    for family, stored_in in families.items():
        name, weight = f"{stored_in.rpartition('.')[0]}.{family}", model.get_parameter(f"{stored_in}.weight")
        of = rows.get(family, slice(None))
        torch.testing.assert_close(found.change[name], (new[f"{stored_in}.weight"] - old[f"{stored_in}.weight"])[of])
        assert torch.equal(found.moment[name], optimizer.state[weight]["exp_avg"][of])
        torch.testing.assert_close(found.gradient[name], weight.grad[of].norm().item())
        deviations = torch.linalg.svdvals(rows_of[stored_in] - rows_of[stored_in].mean(0))
        torch.testing.assert_close(found.variance[name], deviations**2 / len(rows_of[stored_in]))
