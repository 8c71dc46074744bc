"""A moving average of the weights of the model that base and adapters make together."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from prelora_ray.engine.batch_norm import running_statistics
from prelora_ray.method.adapters import is_adapter_parameter, lora_layers


class Ema:
    """An exponential moving average of a run's merged weights: of W before the switch, and of W + s B A after it.

    The mean of merged weights is not what the means of W, B and A would make. The running statistics of batch norm are
    averaged as the weights are, so that both are of the same steps. The average needs no adapters of its own: at the
    switch and at the freeze nothing becomes of it, and it is a plain timm model throughout.
    """

    def __init__(self, average: nn.Module, decay: float) -> None:
        """`average`: the plain timm model, with the weights that the average begins with, or goes on from."""
        self.model = average.eval().requires_grad_(False)
        self._parameters = dict(average.named_parameters())
        self._averages = [*self._parameters.values(), *running_statistics(average)]
        self._decay = decay
        self._update = get_ema_multi_avg_fn(decay)
        self._weights: list[torch.Tensor] = []
        self._adapters: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]] = []
        """Rows of the average as a matrix, B, A and s of W + s B A."""

    def follow(self, model: nn.Module) -> None:
        """Averages from now on the weights of `model`, with adapters or without."""
        own = {name: tensor for name, tensor in model.named_parameters() if not is_adapter_parameter(name)}
        self._weights = [*(own[name] for name in self._parameters), *running_statistics(model)]
        self._adapters = [
            (
                self._parameters[f"{name}.weight"].view(layer.matrix.shape)[start:stop],
                *(layer.lora_B[family], layer.lora_A[family], layer.scaling),
            )
            for name, layer in lora_layers(model).items()
            for family, (start, stop) in layer.rows.items()
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the followed weights after a step: decay * average + (1 - decay) * W.

        Works in place and waits for nothing, so that it can be part of a CUDA graph, and makes no merged weight.
        """
        self._update(self._averages, self._weights, 0)
        for average, b, a, scaling in self._adapters:
            average.addmm_(b, a, alpha=(1 - self._decay) * scaling)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averaged model's tensors, by timm's names."""
        return self.model.state_dict()

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())
