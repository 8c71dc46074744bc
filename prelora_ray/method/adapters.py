"""Low-rank adapters in PEFT's layout: inject, save, load, merge. The plain form, the reference for `kernels/`.

An adapter adds s B A x to the output of a linear layer, with A (rank, in_features), B (out_features,
rank) and s = lora_alpha / rank, the same for every module. timm's fused ``attn.qkv`` carries up to
three adapters, one per row slice. In PEFT's layout these are one adapter of rank rq + rk + rv whose
A is stacked and whose B is block-diagonal, the zeros being part of the file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prelora_ray.method.architecture import Target
from prelora_ray.method.ranks import check_ranks

PEFT_PREFIX = "base_model.model."

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""A fast form of a layer's forward. Arguments: x, W, bias, A, B and s, with A and B as from `LoraLinear.fused`."""


class LoraLinear(nn.Module):
    """A linear layer with adapters on some of its row slices.

    Takes over the layer's own parameters, under the same names, so that the base's state dict and
    an optimizer that knows these parameters stay as they are. ``lora_A`` and ``lora_B`` are keyed by
    family: ``blocks.0.attn.qkv.lora_A.query`` is (rank, in_features).
    """

    def __init__(self, linear: nn.Linear, targets: Sequence[Target], ranks: Mapping[str, int], scaling: float) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.scaling = scaling
        self.product: Product | None = None
        """Computes the layer's output; None computes it in the plain form."""
        self.rows = {target.family: (target.start, target.stop) for target in targets}
        self.lora_A = nn.ParameterDict(
            {t.family: nn.Parameter(self.weight.new_empty(ranks[t.name], t.in_features)) for t in targets}
        )
        self.lora_B = nn.ParameterDict(
            {t.family: nn.Parameter(self.weight.new_zeros(t.out_features, ranks[t.name])) for t in targets}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None:
            return self.product(x, self.weight, self.bias, *self.fused(), self.scaling)
        y = F.linear(x, self.weight, self.bias)
        updates, end = [], 0
        for family, (start, stop) in self.rows.items():
            if start > end:
                updates.append(y.new_zeros(*y.shape[:-1], start - end))
            updates.append(F.linear(F.linear(x, self.lora_A[family]), self.lora_B[family]) * self.scaling)
            end = stop
        if end < self.out_features:
            updates.append(y.new_zeros(*y.shape[:-1], self.out_features - end))
        return y + (updates[0] if len(updates) == 1 else torch.cat(updates, dim=-1))

    @property
    def rank(self) -> int:
        """Sum of the ranks of all slices' adapters."""
        return sum(len(a) for a in self.lora_A.values())

    def fused(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slices' adapters as one: A (rank, in_features), stacked, and B (out_features, rank), block-diagonal."""
        b = [F.pad(self.lora_B[family], (0, 0, start, self.out_features - stop)) for family, (start, stop) in self.rows.items()]
        return torch.cat([self.lora_A[family] for family in self.rows]), torch.cat(b, dim=1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings a product that holds merged weights up to date with the layer's own."""
        self.product.refresh(self.weight, *self.fused(), self.scaling)  # type: ignore[union-attr]

    def delta(self, family: str) -> torch.Tensor:
        """s B A of one slice, (rows of the slice, in_features)."""
        return self.scaling * (self.lora_B[family] @ self.lora_A[family])

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W + s B A, (out_features, in_features)."""
        weight = self.weight.clone()
        for family, (start, stop) in self.rows.items():
            weight[start:stop] += self.delta(family)
        return weight


def inject(model: nn.Module, targets: Sequence[Target], ranks: Mapping[str, int], scaling: float = 2.0, seed: int = 0) -> None:
    """Gives each target module named in `ranks` (module name -> rank) an adapter, in place.

    A is Kaiming-uniform (a = sqrt 5), drawn by (seed, module name) alone; B is zero, so no output
    changes. A target that `ranks` leaves out gets no adapter.

    Raises ValueError where `ranks` names no target module, or a rank exceeds a weight's smaller side.
    """
    if unknown := set(ranks) - {target.name for target in targets}:
        raise ValueError(f"a rank is given for {sorted(unknown)[0]!r}, which is no target module")
    check_ranks(dict(ranks), targets)
    by_linear: dict[str, list[Target]] = {}
    for target in targets:
        if ranks.get(target.name, 0) > 0:
            by_linear.setdefault(target.linear, []).append(target)
    for path, adapted in by_linear.items():
        parent, _, child = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), f"{path} has adapters already"
        layer = LoraLinear(linear, adapted, ranks, scaling)
        for target in adapted:
            layer.lora_A[target.family].data.copy_(_initial_a(seed, target, ranks[target.name]))
        setattr(model.get_submodule(parent), child, layer)


def _initial_a(seed: int, target: Target, rank: int) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed}/{target.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    a = torch.empty(rank, target.in_features)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def is_adapter_parameter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def base_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors without its adapters, under timm's own names."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_adapter_parameter(name)}


def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the timm model that computes what the adapted one does: W + s B A in place of W."""
    tensors = base_state_dict(model)
    for name, layer in lora_layers(model).items():
        tensors[f"{name}.weight"] = layer.merged_weight()
    return tensors


def peft_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters as PEFT saves them: ``base_model.model.<linear>.lora_A.weight`` and ``.lora_B.weight``."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        a, b = layer.fused()
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.detach()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.detach()
    return tensors


@torch.no_grad()
def load_peft_state_dict(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads what `peft_state_dict` gives into the adapters of a model injected with the same ranks.

    Raises ValueError where names or shapes differ.
    """
    expected = {name: tensor.shape for name, tensor in peft_state_dict(model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise ValueError(f"adapter tensor {name!r} is {found.get(name)} and should be {expected.get(name)}")
    for name, layer in lora_layers(model).items():
        a, b = tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"]
        column = 0
        for family, (start, stop) in layer.rows.items():
            end = column + layer.lora_A[family].shape[0]
            layer.lora_A[family].copy_(a[column:end])
            layer.lora_B[family].copy_(b[start:stop, column:end])
            column = end


def peft_config(model: nn.Module) -> dict[str, Any]:
    """The contents of PEFT's ``adapter_config.json`` for the model's adapters.

    Every module is named in full, and patterns are anchored and escaped, as PEFT reads a pattern as
    a regular expression that a suffix of the module's name may match.
    """
    layers = lora_layers(model)
    ranks = {name: layer.rank for name, layer in layers.items()}
    scaling = next(iter(layers.values())).scaling
    default = min(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != default}
    return {
        "peft_type": "LORA",
        "r": default,
        "lora_alpha": scaling * default,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in others.items()},
        "alpha_pattern": {f"^{re.escape(name)}": scaling * rank for name, rank in others.items()},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
