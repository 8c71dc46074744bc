"""A linear layer, or a convolution, with low-rank adapters as one product.

With W (out, in), A (rank, in) and B (out, rank) the layer applies W + s B A. The sum is taken in the parameters' own
format and rounded once to that of the product: rounding W first would hide a small s B A.

Once W is frozen, a step needs x A' and dy B for the adapters' gradients. The two large products compute both, so that
no activation is read a second time for them:

    M = [ W + s B A   B ]      x  M[:, :in]'  = [ y    x A' ]
        [ A           0 ]      dy M[:out, :]  = [ dx   dy B ]

    dA = s (dy B)' x
    dB = s dy' (x A')

M has room for `width` rows of A and columns of B, of which those beyond the rank stay zero. Layers of one shape and
different ranks then compute alike, so that one compiled block of fixed sizes serves them all.

With * for a convolution in the layer's own form a frozen one that is not of 1 x 1 is

    y = x * (W + s B A)     dB = s dy' (x * A)     dA = s the gradient of A where (dy B) is that of x * A

whose two small convolutions have `width` channels in place of the `out` that the gradient of W takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_Sides = tuple[int, ...]
"""Of height and width, in this order."""


def merged_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] = F.linear,
) -> torch.Tensor:
    """x (..., in) to x (W + s B A)' + bias, (..., out) in `dtype`, the number format of the product.

    For a `weight` (out, in) that trains: the gradients of `a` (rank, in) and `b` (out, rank) follow from its own, which
    is taken over the rows of x once. With a `compute` of x, a weight and a bias it is a convolution's, frozen ones
    included: x (n, channels, height, width), and W + s B A in the shape of `weight`.
    """
    with torch.autocast(x.device.type, enabled=False):
        merged = merge(weight, a, b, scaling).to(dtype)
        return compute(x.to(dtype), merged, None if bias is None else bias.to(dtype))


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s B A in the shape of W, with A and B as matrices; W itself where the rank is 0."""
    return torch.addmm(weight.flatten(1), b, a, alpha=scaling).view_as(weight) if len(a) else weight


class HeldProduct(nn.Module, ABC):
    """x (..., in) to x (W + s B A)' + bias, (..., out).

    Holds W + s B A, and what else its products take, in their form. `refresh` brings that up to date: once after every
    change of W, A or B.
    """

    @torch.no_grad()
    def refresh(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        """Takes over the values of W (out, in), A (rank, in) and B (out, rank)."""
        with torch.autocast(weight.device.type, enabled=False):
            self.pack(merge(weight, a, b, scaling), a, b)

    @abstractmethod
    def pack(self, merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Takes over W + s B A (out, in), A and B."""

    @abstractmethod
    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """As `merged_product`; of what is held only gradients matter: the values are those of the last `refresh`."""


class FrozenProduct(HeldProduct):
    """For a frozen W and bias, with ranks up to a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @abstractmethod
    def multiply(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """What the layer puts out, with gradients for all three, `a` (width, in) and `b` (out, width)."""

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.multiply(x, *self.padded(a, b), scaling)

    def padded(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) with zeros up to the width."""
        spare = self.width - len(a)
        return F.pad(a, (0, 0, 0, spare)), F.pad(b, (0, spare))


class FrozenLinear(FrozenProduct):
    """In the number format `dtype`: holds M."""

    matrix: torch.Tensor
    bias: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, width: int, dtype: torch.dtype) -> None:
        super().__init__(width)
        out_features, in_features = weight.shape
        matrix = weight.new_zeros(out_features + width, in_features + width, dtype=dtype)
        self.register_buffer("matrix", matrix, persistent=False)
        longer = F.pad(frozen_bias(weight, bias), (0, width))  # x A' has none
        self.register_buffer("bias", longer.to(dtype), persistent=False)

    def pack(self, merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        (out_features, in_features), rank = merged.shape, len(a)
        self.matrix[:out_features, :in_features] = merged
        self.matrix[:out_features, in_features : in_features + rank] = b
        self.matrix[out_features : out_features + rank, :in_features] = a

    def multiply(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.matrix.dtype)
        y: torch.Tensor = _Product.apply(rows, a, b, self.matrix, self.bias, scaling)
        return y.view(*x.shape[:-1], -1)


class FrozenConvolution(FrozenProduct):
    """x (n, channels, height, width) to what the layer's convolution makes of it, in the number format `dtype`.

    Holds W + s B A, and never takes the gradient of W. What it saves for the backward is x alone: x * A is computed
    there.
    """

    matrix: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, width: int, dtype: torch.dtype, stride: _Sides, padding: _Sides
    ) -> None:
        """`weight`: (out, channels, height, width)."""
        super().__init__(width)
        self.register_buffer("matrix", torch.zeros_like(weight, dtype=dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        self.stride_and_padding = stride, padding

    @staticmethod
    def saves(weight: torch.Tensor, width: int) -> bool:
        """Whether it takes fewer operations than the gradient of a `weight`, (out, channels, height, width), does."""
        out_features, in_features = weight.flatten(1).shape
        return 2 * width * (in_features + out_features) < in_features * out_features

    def pack(self, merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        self.matrix.copy_(merged.view_as(self.matrix))

    def multiply(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        y: torch.Tensor = _Convolution.apply(
            x.to(self.matrix.dtype), a, b, self.matrix, self.bias, scaling, *self.stride_and_padding
        )
        return y


def frozen_bias(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer's bias, (out,), zero where it has none."""
    return weight.new_zeros(len(weight)) if bias is None else bias.detach()


class _Product(torch.autograd.Function):
    """y, with gradients for x, A and B. `a` and `b` are there for their gradients: their values are in `matrix`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        matrix: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        out_features, in_features = b.shape[0], a.shape[1]
        both = torch.addmm(bias, x, matrix[:, :in_features].t())
        ctx.save_for_backward(x, both[:, out_features:].contiguous(), matrix)
        ctx.scaling, ctx.dtype = scaling, a.dtype
        return both[:, :out_features]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, xa, matrix = ctx.saved_tensors
        both = dy @ matrix[: dy.shape[1]]
        in_features = x.shape[1]
        da = (both[:, in_features:].t() @ x).to(ctx.dtype) * ctx.scaling
        db = (dy.t() @ xa).to(ctx.dtype) * ctx.scaling
        return both[:, :in_features], da, db, None, None, None


class _Convolution(torch.autograd.Function):
    """y, with gradients for x, A and B, as matrices; the value of y is that of `matrix` alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        matrix: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        stride: _Sides,
        padding: _Sides,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b, matrix)
        ctx.scaling, ctx.stride_and_padding = scaling, (stride, padding)
        return F.conv2d(x, matrix, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, a, b, matrix = ctx.saved_tensors
        first, second = a.to(x.dtype).view(-1, *matrix.shape[1:]), b.to(x.dtype)[:, :, None, None]
        xa = F.conv2d(x, first, None, *ctx.stride_and_padding)
        dyb = F.conv2d(dy, second.transpose(0, 1))
        dx = _gradient(dy, x, matrix, *ctx.stride_and_padding, of_weight=False) if ctx.needs_input_grad[0] else None
        da = _gradient(dyb, x, first, *ctx.stride_and_padding, of_weight=True).flatten(1).to(a.dtype) * ctx.scaling
        db = _gradient(dy, xa, second, of_weight=True).flatten(1).to(b.dtype) * ctx.scaling
        return dx, da, db, None, None, None, None, None


def _gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: _Sides = (1, 1),
    padding: _Sides = (0, 0),
    *,
    of_weight: bool,
) -> torch.Tensor:
    """Of a convolution's weight, or of its x."""
    mask = [not of_weight, of_weight, False]
    form = stride, padding, (1, 1), False, (0, 0), 1  # neither dilated nor transposed, over all channels
    gradients = torch.ops.aten.convolution_backward(dy, x, weight, None, *form, mask)
    gradient: torch.Tensor = gradients[of_weight]
    return gradient
