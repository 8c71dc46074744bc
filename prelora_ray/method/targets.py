"""The weights of target modules, and their Frobenius norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prelora_ray.method.architecture import Target


def target_weight(model: nn.Module, target: Target) -> torch.Tensor:
    """Weight (out_features, in_features) that the module applies: W, or W + s B A where it has an adapter."""
    layer: Any = model.get_submodule(target.stored_in)
    weight: torch.Tensor = layer.weight[target.start : target.stop].flatten(1)
    return weight + layer.delta(target.family) if _is_adapted(model, target) else weight


def _is_adapted(model: nn.Module, target: Target) -> bool:
    return target.family in getattr(model.get_submodule(target.stored_in), "lora_A", ())


@torch.no_grad()
def target_norms(model: nn.Module, targets: Sequence[Target]) -> dict[str, float]:
    """Frobenius norm of every target module, by module name.

    Computed on the model's device and read back once. Modules without an adapter share one fused
    pass over views; those with one are taken a layer at a time, so that at most one layer's
    merged weights exist beside the model.
    """
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.layer if _is_adapted(model, target) else -1, []).append(target)
    names: list[str] = []
    norms: list[torch.Tensor] = []
    for group in groups.values():
        names += [target.name for target in group]
        norms += torch._foreach_norm([target_weight(model, target) for target in group])
    values = dict(zip(names, torch.stack(norms).tolist(), strict=True))
    return {target.name: values[target.name] for target in targets}
