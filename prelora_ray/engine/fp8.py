"""The modules that stand in for a model's own where its products are e4m3."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from prelora_ray.kernels.fp8 import Adapter, Fp8FrozenLinear, fp8_mlp
from prelora_ray.kernels.fp8_trained import Fp8TrainedLinear, fp8_trained_mlp
from prelora_ray.method.adapters import LoraLinear


class StandIn(nn.Module):
    """Takes over what a module holds, under the same names, so that the model's state dict stays as it is."""

    takes_over: ClassVar[tuple[str, ...]]

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        for name in self.takes_over:
            setattr(self, name, getattr(plain, name))
        self.train(plain.training)
        self._plain = (plain,)  # in a tuple, or it would be a module of the model

    def plain(self) -> nn.Module:
        """The module that this one stands in for, with what this one holds by now."""
        (plain,) = self._plain
        for name in self.takes_over:
            setattr(plain, name, getattr(self, name))
        return plain.train(self.training)


class Fp8Linear(StandIn):
    """A linear layer without adapters."""

    takes_over = ("weight", "bias")
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        trains = self.weight.requires_grad
        self.product = Fp8TrainedLinear(self.weight) if trains else Fp8FrozenLinear(self.weight, self.bias, width=0)
        self.refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.product(x, self.weight, self.bias, *adapter_of(self))
        return y

    def refresh(self) -> None:
        """Brings the product up to date with the layer's weights."""
        self.product.refresh(self.weight, *adapter_of(self))


class Fp8Mlp(StandIn):
    """Two layers with exact GELU in between, each computed in e4m3, the weights of both frozen or of both training."""

    takes_over = ("fc1", "fc2")
    fc1: Any
    """A LoraLinear or Fp8Linear, its product an Fp8FrozenLinear or an Fp8TrainedLinear."""
    fc2: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.fc1, self.fc2
        if isinstance(first.product, Fp8TrainedLinear):
            return fp8_trained_mlp(x, *((each.product, each.weight, each.bias, adapter_of(each)) for each in (first, second)))
        return fp8_mlp(x, first.product, adapter_of(first), second.product, adapter_of(second))


def adapter_of(layer: LoraLinear | Fp8Linear) -> Adapter:
    if isinstance(layer, LoraLinear):
        return Adapter(*layer.fused(), layer.scaling)
    out_features, in_features = layer.weight.shape
    return Adapter(layer.weight.new_zeros(0, in_features), layer.weight.new_zeros(out_features, 0), 0.0)
