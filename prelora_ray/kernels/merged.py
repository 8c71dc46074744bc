"""A linear layer with low-rank adapters as one product.

With W (out, in), A (rank, in) and B (out, rank) the layer applies W + s B A, which is added in float32 or more and
rounded once to the number format of the product: rounding W first would hide a small s B A.

Once W is frozen, a step needs x A' and dy B for the adapters' gradients, and both ride along in the two large products, so
that no activation is read a second time for them:

    M = [ W + s B A   B ]      x  M[:, :in]'  = [ y    x A' ]
        [ A           0 ]      dy M[:out, :]  = [ dx   dy B ]

    dA = s (dy B)' x
    dB = s dy' (x A')
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def merged_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (..., in) to x (W + s B A)' + bias, (..., out) in `dtype`, the number format of the products.

    Where `weight` (out, in) trains, its gradient and those of `a` (rank, in) and `b` (out, rank) come from one product over the
    rows of x. Where it is frozen, so is `bias`.
    """
    with torch.autocast(x.device.type, enabled=False):
        merged = torch.addmm(weight, b, a, alpha=scaling)
        x = x.to(dtype)
        if weight.requires_grad:
            return F.linear(x, merged.to(dtype), None if bias is None else bias.to(dtype))
        matrix = extended_matrix(merged, a, b).to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        y: torch.Tensor = _FrozenProduct.apply(
            rows, a, b, matrix, F.pad(filled_bias(bias, weight), (0, a.shape[0])).to(dtype), scaling
        )
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def extended_matrix(merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """M, (out + rank, in + rank)."""
    return torch.cat([torch.cat([merged, b], dim=1), F.pad(a, (0, a.shape[0]))])


def filled_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """The frozen bias of a layer, (out,), zero where it has none."""
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()


class _FrozenProduct(torch.autograd.Function):
    """y, with gradients for x, A and B. `a` and `b` stand there for their gradients: their values are in `matrix`."""

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
