"""The product of a frozen linear layer with adapters in 8-bit floating point (e4m3), scaled by row.

As `merged.py` has it, with x, dy and the two halves of M rounded to e4m3, each row by a scale of its own; sums are float32,
results bfloat16. x is kept for the backward in 8 bits. Gradients of A and B are products of bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from prelora_ray.kernels.gelu import gelu_quantize, gelu_quantize_backward
from prelora_ray.kernels.merged import FrozenProduct, frozen_bias
from prelora_ray.kernels.rows import quantize

MULTIPLE = 16
"""What the sizes of a product's matrices must be a multiple of."""


class Fp8FrozenLinear(FrozenProduct):
    """In e4m3, with results in bfloat16. `in`, `out` and the width are multiples of 16."""

    onward: torch.Tensor
    onward_scale: torch.Tensor
    back: torch.Tensor
    back_scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, width: int) -> None:
        super().__init__(width)
        out_features, in_features = weight.shape
        shapes = {"onward": (out_features + width, in_features), "back": (in_features + width, out_features)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float8_e4m3fn, device=weight.device), persistent=False)
            self.register_buffer(f"{name}_scale", torch.ones(shape[0], 1, device=weight.device), persistent=False)
        longer = F.pad(frozen_bias(weight, bias), (0, width))  # x A' has none
        self.register_buffer("bias", longer.bfloat16(), persistent=False)

    def hold(self, merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        spare = self.width - len(a)
        _fill(self.onward, self.onward_scale, F.pad(torch.cat([merged, a]), (0, 0, 0, spare)))
        _fill(self.back, self.back_scale, F.pad(torch.cat([merged, b], dim=1).t(), (0, 0, 0, spare)))

    def multiply(self, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        onward, back = (self.onward, self.onward_scale), (self.back, self.back_scale)
        y: torch.Tensor = _Product.apply(rows, a, b, *onward, *back, self.bias, scaling)
        return y


def _fill(values: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
    rounded, scales = quantize(x)
    values.copy_(rounded)
    scale.copy_(scales)


def scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x w' + bias, (n, m) in bfloat16, of e4m3 x (n, k) and w (m, k), scales (n, 1) and (m, 1), and a bfloat16 bias (m,)."""
    if x.is_cuda:
        return torch._scaled_mm(x, w.t(), x_scale, w_scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)
    y = (x.float() * x_scale) @ (w.float() * w_scale).t()
    return (y if bias is None else y + bias).bfloat16()


Adapter = tuple[torch.Tensor, torch.Tensor, float]
"""A (rank, in), B (out, rank) and s."""


def fp8_mlp(
    x: torch.Tensor, first: Fp8FrozenLinear, first_adapter: Adapter, second: Fp8FrozenLinear, second_adapter: Adapter
) -> torch.Tensor:
    """x (..., in) through two layers with GELU in between, (..., out): the hidden values are kept once, in e4m3."""
    with torch.autocast(x.device.type, enabled=False):
        y: torch.Tensor = _Mlp.apply(
            x.reshape(-1, x.shape[-1]),
            *first.widened(*first_adapter[:2]),
            *second.widened(*second_adapter[:2]),
            *(first.onward, first.onward_scale, first.back, first.back_scale, first.bias),
            *(second.onward, second.onward_scale, second.back, second.back_scale, second.bias),
            first_adapter[2],
            second_adapter[2],
        )
        return y.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """As the one of `merged.py`, with its two halves of M: `onward` (out + width, in) and `back` (in + width, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        onward: torch.Tensor,
        onward_scale: torch.Tensor,
        back: torch.Tensor,
        back_scale: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        out_features = len(b)
        rounded, scale = quantize(x)
        both = scaled_product(rounded, scale, onward, onward_scale, bias)
        ctx.save_for_backward(rounded, scale, both[:, out_features:].contiguous(), back, back_scale)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, a.dtype)
        return both[:, :out_features]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, scale, xa, back, back_scale = ctx.saved_tensors
        x_dtype, a_dtype = ctx.dtypes
        both = scaled_product(*quantize(dy), back, back_scale)
        in_features = x.shape[1]
        da = ((both[:, in_features:] * scale).to(both.dtype).t() @ x.to(both.dtype)).to(a_dtype) * ctx.scaling
        db = (dy.t() @ xa).to(a_dtype) * ctx.scaling
        return both[:, :in_features].to(x_dtype), da, db, *[None] * 6


class _Mlp(torch.autograd.Function):
    """`_Product` twice; h is all that the first one gives, (rows, hidden + width); its hidden values are kept for GELU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a1: torch.Tensor,
        b1: torch.Tensor,
        a2: torch.Tensor,
        b2: torch.Tensor,
        onward1: torch.Tensor,
        onward1_scale: torch.Tensor,
        back1: torch.Tensor,
        back1_scale: torch.Tensor,
        bias1: torch.Tensor,
        onward2: torch.Tensor,
        onward2_scale: torch.Tensor,
        back2: torch.Tensor,
        back2_scale: torch.Tensor,
        bias2: torch.Tensor,
        scaling1: float,
        scaling2: float,
    ) -> torch.Tensor:
        hidden, out_features = len(b1), len(b2)
        rounded, scale = quantize(x)
        h = scaled_product(rounded, scale, onward1, onward1_scale, bias1)
        g, g_scale, h_rounded, h_scale = gelu_quantize(h, hidden)
        both = scaled_product(g, g_scale, onward2, onward2_scale, bias2)
        xa, ga = h[:, hidden:].contiguous(), both[:, out_features:].contiguous()
        ctx.save_for_backward(rounded, scale, xa, h_rounded, h_scale, ga, back1, back1_scale, back2, back2_scale)
        ctx.scalings, ctx.dtypes = (scaling1, scaling2), (x.dtype, a1.dtype)
        return both[:, :out_features]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, scale, xa, h, h_scale, ga, back1, back1_scale, back2, back2_scale = ctx.saved_tensors
        (scaling1, scaling2), (x_dtype, a_dtype) = ctx.scalings, ctx.dtypes
        in_features, hidden = x.shape[1], h.shape[1]
        both = scaled_product(*quantize(dy), back2, back2_scale)
        g, dh, dh_rounded, dh_scale = gelu_quantize_backward(both, h, h_scale)
        da2 = (both[:, hidden:].t() @ g).to(a_dtype) * scaling2
        db2 = (dy.t() @ ga).to(a_dtype) * scaling2
        both = scaled_product(dh_rounded, dh_scale, back1, back1_scale)
        da1 = ((both[:, in_features:] * scale).to(both.dtype).t() @ x.to(both.dtype)).to(a_dtype) * scaling1
        db1 = (dh.t() @ xa).to(a_dtype) * scaling1
        return both[:, :in_features].to(x_dtype), da1, db1, da2, db2, *[None] * 12
