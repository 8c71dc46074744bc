"""The product of a frozen linear layer with adapters in 8-bit floating point (e4m3), scaled by row.

As `merged.py` has it, with x, dy and the two halves of M rounded to e4m3, each row by a scale of its own; sums are float32,
results bfloat16. x is kept for the backward in 8 bits. Gradients of A and B are products of bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from prelora_ray.kernels.merged import FrozenProduct, frozen_bias

E4M3_MAX = 448.0
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
        self.register_buffer("bias", frozen_bias(weight, bias).bfloat16(), persistent=False)

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


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) to e4m3 of the same shape and a float32 scale for each row, (rows, 1): x is about values * scale."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale


def scaled_product(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """x w', (n, m) in bfloat16, of e4m3 x (n, k) and w (m, k) with scales (n, 1) and (m, 1)."""
    if x.is_cuda:
        return torch._scaled_mm(x, w.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return ((x.float() * x_scale) @ (w.float() * w_scale).t()).bfloat16()


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
        both = scaled_product(rounded, scale, onward, onward_scale)
        ctx.save_for_backward(rounded, scale, both[:, out_features:].contiguous(), back, back_scale)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, a.dtype)
        return both[:, :out_features] + bias

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
