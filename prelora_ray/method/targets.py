"""The target modules of a ViT, and their Frobenius norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FAMILIES = ("query", "key", "value", "proj", "fc1", "fc2")

_LINEAR_OF = {
    "query": "attn.qkv",
    "key": "attn.qkv",
    "value": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


@dataclass(frozen=True)
class Target:
    """One adapted weight matrix of one block.

    timm stores query, key and value fused in one ``attn.qkv`` of 3D rows; each is the row slice
    ``start:stop`` of that weight, with a norm and a rank of its own.
    """

    name: str
    """Module name, such as ``blocks.3.attn.query``."""
    family: str
    layer: int
    linear: str
    """Name of the linear layer that stores the weight, such as ``blocks.3.attn.qkv``."""
    start: int
    stop: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def max_rank(self) -> int:
        return min(self.in_features, self.out_features)


def family_of(name: str) -> str:
    """Family of a module name: ``blocks.3.attn.query`` is of family ``query``."""
    return name.rsplit(".", 1)[-1]


def find_targets(model: nn.Module, families: Iterable[str] = FAMILIES) -> list[Target]:
    """Target modules of a timm ViT, by layer and then in the order of ``FAMILIES``.

    Raises ValueError where the model is no ViT with ``blocks.N.attn.qkv``, ``.attn.proj``,
    ``.mlp.fc1`` and ``.mlp.fc2`` as linear layers, or a family is unknown.
    """
    families = set(families)
    if unknown := families - set(FAMILIES):
        raise ValueError(f"unknown target {sorted(unknown)[0]!r}: the targets are {', '.join(FAMILIES)}")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(f"{type(model).__name__} has no `blocks`: PreLoRA adapts the blocks of a timm Vision Transformer")
    targets = []
    for layer, block in enumerate(blocks):
        for family in FAMILIES:
            if family not in families:
                continue
            path = _LINEAR_OF[family]
            try:
                linear = block.get_submodule(path)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"{type(model).__name__} has no linear layer blocks.{layer}.{path}, which target {family!r} "
                    "stands for: choose a timm Vision Transformer with a fused qkv and a plain MLP"
                )
            start, stop = 0, linear.out_features
            if path == "attn.qkv":
                third = linear.out_features // 3
                start = third * FAMILIES.index(family)
                stop = start + third
            name = f"blocks.{layer}.{path.split('.')[0]}.{family}"
            targets.append(Target(name, family, layer, f"blocks.{layer}.{path}", start, stop, linear.in_features))
    return targets


def target_weight(model: nn.Module, target: Target) -> torch.Tensor:
    """Weight (out_features, in_features) that the module applies: W, or W + s B A once it has an adapter."""
    linear: Any = model.get_submodule(target.linear)
    weight: torch.Tensor = linear.weight[target.start : target.stop]
    return weight + linear.delta(target.family) if _is_adapted(model, target) else weight


def _is_adapted(model: nn.Module, target: Target) -> bool:
    return target.family in getattr(model.get_submodule(target.linear), "lora_A", ())


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
