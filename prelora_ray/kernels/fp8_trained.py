"""The product of a linear layer whose weights train, with adapters or without, in e4m3 as `fp8.py` has it.

y and dx sum over different sides of the weights, so these are rounded twice after each change, by row and by column.
The gradient of the weights sums over the rows of x and dy, and is a product of bfloat16: x is kept for it in that, and
so are an MLP's hidden values, in front of GELU. The gradients of adapters follow from it alone.
"""

from __future__ import annotations

from typing import Any

import torch

from prelora_ray.kernels.fp8 import Adapter, Operands, scaled_product
from prelora_ray.kernels.merged import HeldProduct, merge
from prelora_ray.kernels.passes import gelu_quantize, gelu_quantize_backward, quantize_and_sum
from prelora_ray.kernels.rows import Operand, quantize

Pair = tuple[Operand, Operand]
"""A layer's weights as its two products take them, (out, in) and (in, out)."""


class Fp8TrainedLinear(HeldProduct):
    """In e4m3, with results in bfloat16. `in` and `out` are multiples of 16."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.operands = Operands(weight, width=0)

    def pack(self, merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        self.operands.fill(merged, merged.t())

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
            merged = merge(weight, a, b, scaling)
            y: torch.Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), merged, bias, self.operands.both)
            return y.view(*x.shape[:-1], -1)


def fp8_trained_mlp(
    x: torch.Tensor,
    first: tuple[Fp8TrainedLinear, torch.Tensor, torch.Tensor | None, Adapter],
    second: tuple[Fp8TrainedLinear, torch.Tensor, torch.Tensor | None, Adapter],
) -> torch.Tensor:
    """x (..., in) through two layers with GELU in between, (..., out); a layer is its product, W, bias and adapter."""
    with torch.autocast(x.device.type, enabled=False):
        (product1, weight1, bias1, adapter1), (product2, weight2, bias2, adapter2) = first, second
        y: torch.Tensor = _Mlp.apply(
            x.reshape(-1, x.shape[-1]),
            merge(weight1, *adapter1),
            bias1,
            merge(weight2, *adapter2),
            bias2,
            (product1.operands.both, product2.operands.both),
        )
        return y.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """y, with gradients for x, W and bias. `weight` stands there for its gradient: its values are in `pair`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pair: Pair) -> torch.Tensor:
        forward, backward = pair
        ctx.save_for_backward(x.bfloat16(), *backward)
        ctx.dtypes, ctx.has_bias = (x.dtype, weight.dtype), bias is not None
        return scaled_product(quantize(x), forward, _rounded(bias))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, *backward = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        rounded, dbias = quantize_and_sum(dy)
        dx = scaled_product(rounded, Operand(*backward))
        return dx.to(x_dtype), (dy.t() @ x).to(dtype), dbias if ctx.has_bias else None, None


class _Mlp(torch.autograd.Function):
    """`_Product` twice, with GELU in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor | None,
        weight2: torch.Tensor,
        bias2: torch.Tensor | None,
        pairs: tuple[Pair, Pair],
    ) -> torch.Tensor:
        (forward1, backward1), (forward2, backward2) = pairs
        h = scaled_product(quantize(x), forward1, _rounded(bias1))
        ctx.save_for_backward(x.bfloat16(), h, *backward1, *backward2)
        ctx.dtypes, ctx.have_bias = (x.dtype, weight1.dtype), (bias1 is not None, bias2 is not None)
        return scaled_product(gelu_quantize(h), forward2, _rounded(bias2))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, h, back1, back1_scale, back2, back2_scale = ctx.saved_tensors
        (x_dtype, dtype), (has_bias1, has_bias2) = ctx.dtypes, ctx.have_bias
        rounded, dbias2 = quantize_and_sum(dy)
        g, dh, rounded, dbias1 = gelu_quantize_backward(scaled_product(rounded, Operand(back2, back2_scale)), h)
        dw1, dw2 = (dh.t() @ x).to(dtype), (dy.t() @ g).to(dtype)
        dx = scaled_product(rounded, Operand(back1, back1_scale))
        return dx.to(x_dtype), dw1, dbias1 if has_bias1 else None, dw2, dbias2 if has_bias2 else None, None


def _rounded(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.bfloat16()
