"""What rank rules go by, measured on a trunk at the moment at which forks leave it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from prelora_ray.data.batch import Batch, to_device
from prelora_ray.engine.optim import optimizer_state
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.method.targets import target_weight
from rank_rules import Evidence, InputMoments

Weights = dict[str, torch.Tensor]
"""Weight (out, in) by module name."""


@torch.no_grad()
def weights_of(state: TrainState) -> Weights:
    """Copies, on the device."""
    return {target.name: target_weight(state.model, target).clone() for target in state.targets}


def evidence_of(step: TrainStep, before: Weights, batches: Iterable[Batch]) -> Evidence:
    """`before`: the weights one window ago. `batches`: training batches, which go through the model as in training,
    with their mixing and drop path, and change nothing of the run."""
    state = step.state
    moments = optimizer_state(state.model, state.optimizer)
    change, moment = {}, {}
    for target in state.targets:
        change[target.name] = target_weight(state.model, target).detach() - before[target.name]
        whole = moments[f"{target.stored_in}.weight"]["exp_avg"]
        moment[target.name] = whole[target.start : target.stop].flatten(1).clone()
    sides = {target.name: target.in_features + target.out_features for target in state.targets}
    gradient, variance = _passed(step, batches)
    return Evidence(sides, change, moment, gradient, variance)


def _passed(step: TrainStep, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Norms of the targets' gradients, and variances of their inputs."""
    state = step.state
    layers: dict[str, Any] = {target.stored_in: state.model.get_submodule(target.stored_in) for target in state.targets}
    inputs = {
        name: InputMoments(layer.in_features, state.device) for name, layer in layers.items() if isinstance(layer, nn.Linear)
    }
    hooks = [layers[name].register_forward_pre_hook(partial(_add, moments)) for name, moments in inputs.items()]
    state.network.train()
    count = 0
    with torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
        for batch in batches:
            tensors = {name: to_device(tensor, state.device) for name, tensor in step._inputs(batch).items()}
            step._add_gradients(tensors, range(0, step.plan.num_slots, step.micro_batch), exchanges=False)
            count += 1
    for hook in hooks:
        hook.remove()
    norms = {
        target.name: float(layers[target.stored_in].weight.grad[target.start : target.stop].double().norm()) / count
        for target in state.targets
    }
    state.optimizer.zero_grad()
    found = {name: moments.variance() for name, moments in inputs.items()}
    return norms, {target.name: found[target.stored_in] for target in state.targets if target.stored_in in found}


def _add(moments: InputMoments, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    moments.add(inputs[0])
