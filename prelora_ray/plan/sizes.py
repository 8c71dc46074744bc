"""How large a recipe's model is, counted on tensors without values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prelora_ray.config import MethodSettings, ModelSettings
from prelora_ray.engine.model import create_model
from prelora_ray.errors import UserError
from prelora_ray.method.adapters import inject
from prelora_ray.method.architecture import Target, find_targets
from prelora_ray.method.phases import Phase, count_parameters, freeze_parameters
from prelora_ray.method.ranks import rank_choices
from prelora_ray.schedule import ranks_for


@dataclass(frozen=True)
class ForwardSize:
    """Of one image's forward through the model without adapters."""

    flops: float
    outputs: int
    """Numbers that linear layers and convolutions put out, as what a backward needs of a forward grows with them."""


def forward_size(settings: ModelSettings, num_classes: int) -> ForwardSize:
    outputs = 0

    def count(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()

    with torch.device("meta"):
        model = create_model(settings, num_classes, seed=0)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *settings.input_shape))
    return ForwardSize(float(counter.get_total_flops()), outputs)


def parameters_by_phase(
    model_settings: ModelSettings, method: MethodSettings, num_classes: int, ranks: dict[str, int] | None
) -> dict[Phase, tuple[int, int]]:
    """(trainable, all) parameters in each phase; without `ranks`, with those that `even_ranks` deals.

    Raises UserError where the model, its targets or the ranks do not fit each other.
    """
    with torch.device("meta"):
        model = create_model(model_settings, num_classes, seed=0)
    counts = {Phase.FULL: count_parameters(model)}
    try:
        targets = find_targets(model, method.targets)
    except ValueError as error:
        raise UserError(f"model.name = {model_settings.name!r} is not allowed: {error}") from None
    try:
        inject(model, targets, even_ranks(method, targets) if ranks is None else ranks)
        counts[Phase.WARMUP] = count_parameters(model)
        freeze_parameters(model, targets, method.freeze)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"method does not fit model.name = {model_settings.name!r}: {error}") from None
    return counts | {Phase.LORA: count_parameters(model)}


def even_ranks(method: MethodSettings, targets: list[Target]) -> dict[str, int]:
    """Rank by module name: the recipe's own pattern, or r_min to r_max dealt out evenly.

    The rule's ranks come at the switch.
    """
    if method.rank_pattern is not None:
        return ranks_for(method, {}, [target.name for target in targets])
    choices = rank_choices(method.r_min, method.r_max)
    return {target.name: choices[target.layer % len(choices)] for target in targets}
