"""The product of a frozen linear layer with adapters in 8-bit floating point (e4m3), scaled by row.

As `merged.py` has it, with x, dy and the two halves of M rounded to e4m3, each row by a scale of its own; sums are
float32, results bfloat16. x is kept for the backward in 8 bits. Gradients of A and B are products of bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from prelora_ray.kernels.merged import FrozenProduct, frozen_bias
from prelora_ray.kernels.passes import gelu_quantize_both, gelu_quantize_both_backward
from prelora_ray.kernels.rows import Operand, quantize

MULTIPLE = 16
"""What the sizes of a product's matrices must be a multiple of."""


class Packed(NamedTuple):
    """A layer's weights as its products take them."""

    forward: Operand
    """(out + width, in)."""
    backward: Operand
    """(in + width, out)."""
    bias: torch.Tensor
    """(out + width,) in bfloat16."""


class Adapter(NamedTuple):
    """Of rank 0 where a layer has none."""

    a: torch.Tensor
    """(rank, in)."""
    b: torch.Tensor
    """(out, rank)."""
    scaling: float


class Operands(nn.Module):
    """Buffers for a layer's weights (out, in) as its two products take them, with room for `width` rows more."""

    forward_values: torch.Tensor
    forward_scale: torch.Tensor
    backward_values: torch.Tensor
    backward_scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, width: int) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        shapes = {"forward": (out_features + width, in_features), "backward": (in_features + width, out_features)}
        for name, shape in shapes.items():
            values = torch.zeros(shape, dtype=torch.float8_e4m3fn, device=weight.device)
            self.register_buffer(f"{name}_values", values, persistent=False)
            self.register_buffer(f"{name}_scale", torch.ones(shape[0], 1, device=weight.device), persistent=False)

    @property
    def both(self) -> tuple[Operand, Operand]:
        """(out + width, in) and (in + width, out)."""
        return Operand(self.forward_values, self.forward_scale), Operand(self.backward_values, self.backward_scale)

    def fill(self, forward: torch.Tensor, backward: torch.Tensor) -> None:
        for operand, x in zip(self.both, (forward, backward), strict=True):
            rounded = quantize(x)
            operand.values.copy_(rounded.values)
            operand.scale.copy_(rounded.scale)


class Fp8FrozenLinear(FrozenProduct):
    """In e4m3, with results in bfloat16. `in`, `out` and the width are multiples of 16."""

    bias: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, width: int) -> None:
        super().__init__(width)
        self.operands = Operands(weight, width)
        longer = F.pad(frozen_bias(weight, bias), (0, width))  # x A' has none
        self.register_buffer("bias", longer.bfloat16(), persistent=False)

    @property
    def packed(self) -> Packed:
        return Packed(*self.operands.both, self.bias)

    def pack(self, merged: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        spare = self.width - len(a)
        forward, backward = torch.cat([merged, a]), torch.cat([merged, b], dim=1).t()
        self.operands.fill(F.pad(forward, (0, 0, 0, spare)), F.pad(backward, (0, 0, 0, spare)))

    def multiply(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), a, b, self.packed, scaling)
        return y.view(*x.shape[:-1], -1)


def scaled_product(x: Operand, w: Operand, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x w' + bias, (n, m) in bfloat16, of x (n, k), w (m, k) and a bfloat16 bias (m,)."""
    if x.values.is_cuda:
        return torch._scaled_mm(
            x.values, w.values.t(), x.scale, w.scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    y = (x.values.float() * x.scale) @ (w.values.float() * w.scale).t()
    return (y if bias is None else y + bias).bfloat16()


def fp8_mlp(
    x: torch.Tensor, first: Fp8FrozenLinear, first_adapter: Adapter, second: Fp8FrozenLinear, second_adapter: Adapter
) -> torch.Tensor:
    """x (..., in) through two layers with GELU in between, (..., out): the hidden values are kept once, in e4m3."""
    with torch.autocast(x.device.type, enabled=False):
        y: torch.Tensor = _Mlp.apply(
            x.reshape(-1, x.shape[-1]),
            *first.padded(first_adapter.a, first_adapter.b),
            *second.padded(second_adapter.a, second_adapter.b),
            (first.packed, second.packed),
            (first_adapter.scaling, second_adapter.scaling),
        )
        return y.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """As the one of `merged.py`, with its two halves of M."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, packed: Packed, scaling: float) -> torch.Tensor:
        out_features = len(b)
        rounded = quantize(x)
        both = scaled_product(rounded, packed.forward, packed.bias)
        ctx.save_for_backward(*rounded, both[:, out_features:].contiguous(), *packed.backward)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, a.dtype)
        return both[:, :out_features]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, scale, xa, *backward = ctx.saved_tensors
        x_dtype, a_dtype = ctx.dtypes
        both = scaled_product(quantize(dy), Operand(*backward))
        in_features = x.shape[1]
        da = ((both[:, in_features:] * scale).to(both.dtype).t() @ x.to(both.dtype)).to(a_dtype) * ctx.scaling
        db = (dy.t() @ xa).to(a_dtype) * ctx.scaling
        return both[:, :in_features].to(x_dtype), da, db, None, None


class _Mlp(torch.autograd.Function):
    """`_Product` twice. h is all that the first one gives, (rows, hidden + width); its hidden values are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a1: torch.Tensor,
        b1: torch.Tensor,
        a2: torch.Tensor,
        b2: torch.Tensor,
        packed: tuple[Packed, Packed],
        scalings: tuple[float, float],
    ) -> torch.Tensor:
        (first, second), hidden, out_features = packed, len(b1), len(b2)
        rounded = quantize(x)
        h = scaled_product(rounded, first.forward, first.bias)
        g, kept = gelu_quantize_both(h, hidden)
        both = scaled_product(g, second.forward, second.bias)
        xa, ga = h[:, hidden:].contiguous(), both[:, out_features:].contiguous()
        ctx.save_for_backward(*rounded, xa, *kept, ga, *first.backward, *second.backward)
        ctx.scalings, ctx.dtypes = scalings, (x.dtype, a1.dtype)
        return both[:, :out_features]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, scale, xa, h, h_scale, ga, back1, back1_scale, back2, back2_scale = ctx.saved_tensors
        (scaling1, scaling2), (x_dtype, a_dtype) = ctx.scalings, ctx.dtypes
        in_features, hidden = x.shape[1], h.shape[1]
        both = scaled_product(quantize(dy), Operand(back2, back2_scale))
        g, dh, dh_rounded = gelu_quantize_both_backward(both, Operand(h, h_scale))
        da2 = (both[:, hidden:].t() @ g).to(a_dtype) * scaling2
        db2 = (dy.t() @ ga).to(a_dtype) * scaling2
        both = scaled_product(dh_rounded, Operand(back1, back1_scale))
        da1 = ((both[:, in_features:] * scale).to(both.dtype).t() @ x.to(both.dtype)).to(a_dtype) * scaling1
        db1 = (dh.t() @ xa).to(a_dtype) * scaling1
        return both[:, :in_features].to(x_dtype), da1, db1, da2, db2, None, None
