"""Low-rank adapters in PEFT's layout: inject, save, load, merge. The plain form, the reference for `kernels/`.

An adapter adds s B A x to the output of a linear layer, with A (rank, in_features), B (out_features,
rank) and s = lora_alpha / rank, the same for every module. timm's fused ``attn.qkv`` carries up to
three adapters, one per row slice. In PEFT's layout these are one adapter of rank rq + rk + rv whose
A is stacked and whose B is block-diagonal, the zeros being part of the file.

A convolution's weight (out, in, height, width) is the matrix (out, in * height * width), and its adapter the
same two matrices. As they are applied, and in PEFT's files, A is a convolution of the layer's own form with
`rank` channels out, and B one of 1 x 1.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from prelora_ray.method.architecture import Target
from prelora_ray.method.ranks import check_ranks

PEFT_PREFIX = "base_model.model."

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""A fast form of a layer's forward. Arguments: x, W, bias, A, B and s, with A and B as from `LoraLayer.fused`."""


class LoraLayer(nn.Module, ABC):
    """A layer with adapters on some of its weight's row slices.

    Takes over the layer's own parameters, under the same names, so that the base's state dict and
    an optimizer that knows these parameters stay as they are. ``lora_A`` and ``lora_B`` are keyed by
    family: ``blocks.0.attn.qkv.lora_A.query`` is (rank, in_features).
    """

    channel_dim: ClassVar[int]
    """The dimension of what it puts out that has an entry for each row of its weight."""
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    """What a layer like it makes of x with a weight and a bias."""
    is_linear: bool
    """Whether it is x W' + bias over the channels of x, so that a product for linear layers serves it."""

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, targets: Sequence[Target], ranks: Mapping[str, int], scaling: float
    ) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
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

    @abstractmethod
    def adapt(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B A x, with A and B as matrices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None:
            return self.product(x, self.weight, self.bias, *self.fused(), self.scaling)
        y = self.compute(x, self.weight, self.bias)
        updates, end = [], 0
        for family, (start, stop) in self.rows.items():
            if start > end:
                updates.append(torch.zeros_like(y.narrow(self.channel_dim, end, start - end)))
            updates.append(self.adapt(x, self.lora_A[family], self.lora_B[family]) * self.scaling)
            end = stop
        if end < len(self.weight):
            updates.append(torch.zeros_like(y.narrow(self.channel_dim, end, len(self.weight) - end)))
        return y + (updates[0] if len(updates) == 1 else torch.cat(updates, dim=self.channel_dim))

    @property
    def matrix(self) -> torch.Tensor:
        """The weight, (out_features, in_features)."""
        return self.weight.flatten(1)

    @property
    def rank(self) -> int:
        """Sum of the ranks of all slices' adapters."""
        return sum(len(a) for a in self.lora_A.values())

    def fused(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slices' adapters as one: A (rank, in_features), stacked, and B (out_features, rank), block-diagonal."""
        rows = len(self.weight)
        b = [F.pad(self.lora_B[family], (0, 0, start, rows - stop)) for family, (start, stop) in self.rows.items()]
        return torch.cat([self.lora_A[family] for family in self.rows]), torch.cat(b, dim=1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings a product that holds merged weights up to date with the layer's own."""
        self.product.refresh(self.matrix, *self.fused(), self.scaling)  # type: ignore[union-attr]

    def delta(self, family: str) -> torch.Tensor:
        """s B A of one slice, (rows of the slice, in_features)."""
        return self.scaling * (self.lora_B[family] @ self.lora_A[family])

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W + s B A, in the weight's own shape."""
        matrix = self.matrix.clone()
        for family, (start, stop) in self.rows.items():
            matrix[start:stop] += self.delta(family)
        return matrix.view_as(self.weight)


class LoraLinear(LoraLayer):
    """x (..., in_features) to (..., out_features)."""

    channel_dim = -1
    compute = staticmethod(F.linear)
    is_linear = True

    def adapt(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, a), b)


class LoraConv2d(LoraLayer):
    """x (n, in, height, width) to (n, out, height, width), by a convolution that `takes_adapter`."""

    channel_dim = 1

    def __init__(self, layer: nn.Conv2d, targets: Sequence[Target], ranks: Mapping[str, int], scaling: float) -> None:
        super().__init__(layer, targets, ranks, scaling)
        self.stride, self.padding = layer.stride, layer.padding
        self.compute = partial(F.conv2d, stride=layer.stride, padding=layer.padding)
        self.is_linear = (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None and self.is_linear:
            y = self.product(x.movedim(1, -1), self.matrix, self.bias, *self.fused(), self.scaling)
            return y.movedim(-1, 1)
        return super().forward(x)

    def adapt(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = _in_peft_shapes(a, b, self.weight)
        return F.conv2d(self.compute(x, a, None), b)


def _in_peft_shapes(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, matrices, as the weights of the two layers that PEFT puts beside the one with this weight."""
    return a.view(len(a), *weight.shape[1:]), b.view(*b.shape, *(1 for _ in weight.shape[2:]))


def inject(model: nn.Module, targets: Sequence[Target], ranks: Mapping[str, int], scaling: float = 2.0, seed: int = 0) -> None:
    """Gives each target module named in `ranks` (module name -> rank) an adapter, in place.

    A is Kaiming-uniform (a = sqrt 5), drawn by (seed, module name) alone; B is zero, so no output
    changes. A target that `ranks` leaves out gets no adapter.

    Raises ValueError where `ranks` names no target module, or a rank exceeds a weight's smaller side.
    """
    if unknown := set(ranks) - {target.name for target in targets}:
        raise ValueError(f"a rank is given for {sorted(unknown)[0]!r}, which is no target module")
    check_ranks(dict(ranks), targets)
    by_layer: dict[str, list[Target]] = {}
    for target in targets:
        if ranks.get(target.name, 0) > 0:
            by_layer.setdefault(target.stored_in, []).append(target)
    for path, adapted in by_layer.items():
        plain = model.get_submodule(path)
        assert isinstance(plain, (nn.Linear, nn.Conv2d)), f"{path} has adapters already"
        arguments = adapted, ranks, scaling
        layer = LoraConv2d(plain, *arguments) if isinstance(plain, nn.Conv2d) else LoraLinear(plain, *arguments)
        for target in adapted:
            layer.lora_A[target.family].data.copy_(_initial_a(seed, target, ranks[target.name]))
        model.set_submodule(path, layer)


def _initial_a(seed: int, target: Target, rank: int) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed}/{target.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    a = torch.empty(rank, target.in_features)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


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
    """The adapters as PEFT saves them: ``base_model.model.<layer>.lora_A.weight`` and ``.lora_B.weight``."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        a, b = _in_peft_shapes(*layer.fused(), layer.weight)
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
        a, b = (tensors[f"{PEFT_PREFIX}{name}.{part}.weight"].flatten(1) for part in ("lora_A", "lora_B"))
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
