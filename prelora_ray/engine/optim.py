"""The optimizer, what it decays, its schedule, and its hand-over from phase to phase."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn

from prelora_ray.config import MethodSettings, Settings
from prelora_ray.method.adapters import is_adapter_parameter
from prelora_ray.method.architecture import is_embedding
from prelora_ray.method.phases import Phase
from prelora_ray.torchvision_ops import make_importable

OptimizerState = dict[str, dict[str, torch.Tensor]]
"""The optimizer's moments and step count by parameter name."""
_STEP = "step"
_SAMPLES = 20
"""Of the learning rate in an epoch, for its sum: closer than a thousandth, whatever the number of steps."""


def build_optimizer(
    model: nn.Module, settings: Settings, state: OptimizerState | None = None, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over all that trains, going on from `state` for the parameters that it names.

    `capturable`: whether its steps become part of a CUDA graph, which reads the learning rates from the device; of
    AdamW alone.

    Adapters form groups of their own. Vectors (norms, biases) and what timm's `no_weight_decay` names
    (tokens, position embeddings) have no weight decay. With `train.layer_decay` each layer has groups of its own.
    """
    without_decay = set(getattr(model, "no_weight_decay", set)())
    scales = _layer_scales(model, settings.train.layer_decay)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in _trainable(model):
        if is_adapter_parameter(name):
            kind = "adapter"
        elif parameter.ndim <= 1 or name in without_decay or is_embedding(name):
            kind = "no_decay"
        else:
            kind = "decay"
        groups.setdefault((kind, scales.get(id(parameter), 1.0)), []).append(parameter)
    decay = {"decay": settings.train.weight_decay, "adapter": settings.method.adapter_weight_decay}
    content = [
        {"params": parameters, "weight_decay": decay.get(kind, 0.0), "name": kind, "lr_scale": scale}
        for (kind, scale), parameters in groups.items()
    ]
    rate, betas = settings.train.learning_rate, settings.train.betas
    optimizer: torch.optim.Optimizer
    if settings.train.optimizer == "lamb":
        assert not capturable, "its count of steps is on the CPU, so a graph would repeat one step's"
        optimizer = _timm_optim().Lamb(content, lr=rate, betas=betas, max_grad_norm=None)  # the step clips
    else:
        fused = all(parameter.is_cuda for parameter in model.parameters())
        optimizer = torch.optim.AdamW(content, lr=rate, betas=betas, fused=fused, capturable=capturable)
    if state:
        _load(optimizer, _names(model, optimizer), state, counts_by_group=settings.train.optimizer == "lamb")
    if capturable:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return optimizer


def _load(optimizer: torch.optim.Optimizer, order: list[str], state: OptimizerState, *, counts_by_group: bool) -> None:
    """`order`: parameter names as the optimizer numbers them. `counts_by_group`: whether it counts the steps of a group
    once, as LAMB does, and not those of each parameter."""
    content = optimizer.state_dict()
    content["state"] = {i: state[name] for i, name in enumerate(order) if name in state}
    if counts_by_group:
        for group in content["param_groups"]:
            steps = {int(content["state"][i][_STEP]) for i in group["params"] if i in content["state"]}
            assert len(steps) <= 1, "the parameters of a group have begun to train together"
            if steps:
                group[_STEP] = steps.pop()
        content["state"] = {i: _without_step(entry) for i, entry in content["state"].items()}
    optimizer.load_state_dict(content)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The optimizer's state by parameter name; empty before its first step.

    LAMB's count of steps, one for each group, is told for each parameter, as AdamW's is.
    """
    content: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    counts = [
        {_STEP: torch.tensor(float(group[_STEP]))} if _STEP in group else {}
        for group in optimizer.param_groups
        for _ in group["params"]
    ]
    return {name: content[i] | counts[i] for i, name in enumerate(_names(model, optimizer)) if i in content}


def set_learning_rate(
    optimizer: torch.optim.Optimizer, settings: Settings, step: int, batches: int, phase: Phase, switch_step: int | None
) -> float:
    """Sets the groups' learning rates for optimizer step `step` (from 0) and returns the run's.

    `batches` is the steps in an epoch, `switch_step` the steps done at the switch.
    """
    rate = learning_rate(settings, step, batches)
    for group in optimizer.param_groups:
        group_rate = rate * group["lr_scale"]
        if group["name"] == "adapter" and switch_step is not None:
            group_rate *= adapter_rate_scale(settings.method, phase, step - switch_step)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(group_rate)
        else:
            group["lr"] = group_rate
    return rate


def adapter_rate_scale(method: MethodSettings, phase: Phase, steps: int) -> float:
    """The adapters' learning rate as a multiple of the run's, in the step behind so many since the switch."""
    scale = method.adapter_learning_rate_scale if phase is Phase.LORA else 1.0
    return scale * min(1.0, (steps + 1) / max(1, method.adapter_ramp_steps))


def learning_rate(settings: Settings, step: int, batches: int) -> float:
    """A linear ramp from 0, then down as `train.schedule` says, to what is the final learning rate as the run ends.

    `constant-then-decay` is warmup-stable-decay (MiniCPM, arXiv 2404.06395), and 1 - sqrt the best decay of Hägele et
    al. (arXiv 2405.18392). With `train.bend` the rate is that of the schedule as it was, where the run's own step has
    come to.
    """
    train = settings.train
    now, ramp, total = train.scheduled(step, batches), train.ramp_epochs * batches, train.schedule_epochs * batches
    if now < ramp:
        return train.learning_rate * (now + 1) / ramp
    if train.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * (now - ramp) / max(1, total - ramp)))
    else:
        height = 1 - math.sqrt(max(0.0, 1 - (total - now) / (train.decay_epochs * batches)))
    final = train.final_learning_rate_scale
    return train.learning_rate * (final + (1 - final) * height)


def rates_left(settings: Settings) -> list[float]:
    """Share of the learning rate's sum over the run that is left after 0, 1, 2, ... epochs."""
    epochs = range(settings.train.epochs)
    sums = [sum(learning_rate(settings, epoch * _SAMPLES + i, _SAMPLES) for i in range(_SAMPLES)) for epoch in epochs]
    left = list(itertools.accumulate(reversed(sums), initial=0.0))[::-1]
    return [rest / left[0] for rest in left]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _layer_scales(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """Factor of each parameter's learning rate, by the parameter's id; empty where all are 1.

    timm counts the layers: patches, tokens and positions are the first, then come the blocks, the last of them with the
    norm behind it, and the head. An adapter is of its block's.
    """
    if layer_decay == 1:
        return {}
    groups = _timm_optim().param_groups_layer_decay(model, layer_decay=layer_decay)
    return {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}


def _timm_optim() -> Any:
    """timm's optimizers. Checkpoints are read without timm, which takes a second to import."""
    make_importable()
    import timm.optim

    return timm.optim


def _without_step(entry: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in entry.items() if key != _STEP}


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
