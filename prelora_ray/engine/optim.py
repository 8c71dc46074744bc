"""AdamW, what it decays, its schedule, and its hand-over from phase to phase."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn

from prelora_ray.config import Settings
from prelora_ray.method.adapters import is_adapter_parameter
from prelora_ray.method.architecture import is_embedding

OptimizerState = dict[str, dict[str, torch.Tensor]]
"""AdamW's moments and step count by parameter name."""
_SAMPLES = 20
"""Of the learning rate in an epoch, for its sum: closer than a thousandth, whatever the number of steps."""


def build_optimizer(
    model: nn.Module, settings: Settings, state: OptimizerState | None = None, *, capturable: bool = False
) -> torch.optim.AdamW:
    """AdamW over all that trains, going on from `state` for the parameters that it names.

    `capturable`: whether its steps become part of a CUDA graph, which reads the learning rates from the device.

    Adapters form a group of their own. Vectors (norms, biases) and what timm's `no_weight_decay` names
    (tokens, position embeddings) have no weight decay.
    """
    without_decay = set(getattr(model, "no_weight_decay", set)())
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "adapter": []}
    for name, parameter in _trainable(model):
        if is_adapter_parameter(name):
            groups["adapter"].append(parameter)
        elif parameter.ndim <= 1 or name in without_decay or is_embedding(name):
            groups["no_decay"].append(parameter)
        else:
            groups["decay"].append(parameter)
    decay = {"decay": settings.train.weight_decay, "adapter": settings.method.adapter_weight_decay}
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay.get(name, 0.0), "name": name}
            for name, parameters in groups.items()
            if parameters
        ],
        lr=settings.train.learning_rate,
        betas=settings.train.betas,
        fused=all(parameter.is_cuda for parameter in model.parameters()),
        capturable=capturable,
    )
    if state:
        order = _names(model, optimizer)
        content = optimizer.state_dict()
        content["state"] = {i: state[name] for i, name in enumerate(order) if name in state}
        optimizer.load_state_dict(content)
    if capturable:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return optimizer


def optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW) -> OptimizerState:
    """The optimizer's state by parameter name; empty before its first step."""
    content: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {name: content[i] for i, name in enumerate(_names(model, optimizer)) if i in content}


def set_learning_rate(
    optimizer: torch.optim.AdamW, settings: Settings, step: int, batches: int, switch_step: int | None
) -> float:
    """Sets the groups' learning rates for optimizer step `step` (from 0) and returns the run's.

    `batches` is the steps in an epoch, `switch_step` the steps done at the switch.
    """
    rate = learning_rate(settings, step, batches)
    for group in optimizer.param_groups:
        group_rate = rate
        if group["name"] == "adapter" and switch_step is not None:
            risen = adapter_rise(step - switch_step, settings.method.adapter_ramp_steps)
            group_rate = rate * settings.method.adapter_learning_rate_scale * risen
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(group_rate)
        else:
            group["lr"] = group_rate
    return rate


def adapter_rise(steps: int, ramp: int) -> float:
    """Share of their learning rate that adapters have in the step behind so many since the switch."""
    return min(1.0, (steps + 1) / ramp) if ramp else 1.0


def learning_rate(settings: Settings, step: int, batches: int) -> float:
    """A linear ramp from 0, then half a cosine down to the final learning rate at the run's last step.

    With `train.bend` it is that of the schedule as it was, where the run's own step has come to.
    """
    train = settings.train
    now, ramp, total = train.scheduled(step, batches), train.ramp_epochs * batches, train.schedule_epochs * batches
    if now < ramp:
        return train.learning_rate * (now + 1) / ramp
    return train.learning_rate * fraction_of_peak(now - ramp, total - ramp, train.final_learning_rate_scale)


def fraction_of_peak(done: float, total: int, final: float) -> float:
    """Half a cosine from 1 down to `final`, over `total` steps of which so many are done."""
    return final + (1 - final) * (0.5 * (1 + math.cos(math.pi * done / max(1, total))))


def rates_left(settings: Settings) -> list[float]:
    """Share of the learning rate's sum over the run that is left after 0, 1, 2, ... epochs."""
    epochs = range(settings.train.epochs)
    sums = [sum(learning_rate(settings, epoch * _SAMPLES + i, _SAMPLES) for i in range(_SAMPLES)) for epoch in epochs]
    left = list(itertools.accumulate(reversed(sums), initial=0.0))[::-1]
    return [rest / left[0] for rest in left]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _names(model: nn.Module, optimizer: torch.optim.AdamW) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
