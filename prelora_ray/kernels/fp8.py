"""The product of a frozen linear layer with adapters in 8-bit floating point (e4m3), scaled by row.

As `merged.py` has it, with x, dy and the matrices rounded to e4m3, each row by a scale of its own; sums are float32, results
bfloat16. x is kept for the backward in 8 bits. Gradients of A and B are products of bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from prelora_ray.kernels.merged import extended_matrix, filled_bias

E4M3_MAX = 448.0
_MULTIPLE = 16
"""What the rows of a product's matrices must be a multiple of."""


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """x (..., in) to x (W + s B A)' + bias, (..., out) in bfloat16, for a frozen `weight` and `bias`.

    `in` and `out` are multiples of 16.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        with torch.no_grad():
            matrix = extended_matrix(torch.addmm(weight, b, a, alpha=scaling), a, b)
            extra = -a.shape[0] % _MULTIPLE
            forward = quantize(F.pad(matrix[:, : weight.shape[1]], (0, 0, 0, extra)))
            backward = quantize(F.pad(matrix[: weight.shape[0]].t(), (0, 0, 0, extra)))
        y: torch.Tensor = _FrozenProduct.apply(rows, a, b, *forward, *backward, filled_bias(bias, weight), scaling)
        return y.view(*x.shape[:-1], -1)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) to e4m3 of the same shape and a float32 scale for each row, (rows, 1): x is about values * scale."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale


def scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x w' + bias, (n, m) in bfloat16, of e4m3 x (n, k) and w (m, k) with scales (n, 1) and (m, 1)."""
    if x.is_cuda:
        return torch._scaled_mm(x, w.t(), x_scale, w_scale.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=True)
    product = (x.float() * x_scale) @ (w.float() * w_scale).t()
    return (product if bias is None else product + bias).bfloat16()


class _FrozenProduct(torch.autograd.Function):
    """As the one of `merged.py`. `forward_matrix` is (out + rank, in), `backward_matrix` (in + rank, out), filled up to 16."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        forward_matrix: torch.Tensor,
        forward_scale: torch.Tensor,
        backward_matrix: torch.Tensor,
        backward_scale: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        out_features, rank = b.shape
        rounded, scale = quantize(x)
        both = scaled_product(rounded, scale, forward_matrix, forward_scale)
        xa = both[:, out_features : out_features + rank].contiguous()
        ctx.save_for_backward(rounded, scale, xa, backward_matrix, backward_scale)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, a.dtype)
        return both[:, :out_features] + bias.to(both.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, scale, xa, matrix, matrix_scale = ctx.saved_tensors
        x_dtype, a_dtype = ctx.dtypes
        both = scaled_product(*quantize(dy), matrix, matrix_scale)
        in_features, rank = x.shape[1], xa.shape[1]
        dyb = both[:, in_features : in_features + rank]
        da = ((dyb * scale).to(both.dtype).t() @ x.to(both.dtype)).to(a_dtype) * ctx.scaling
        db = (dy.t() @ xa).to(a_dtype) * ctx.scaling
        return both[:, :in_features].to(x_dtype), da, db, *[None] * 6
