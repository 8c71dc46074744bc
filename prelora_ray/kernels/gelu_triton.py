"""The kernels of `gelu.py`, which says what they compute. A program takes a row, whole."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from prelora_ray.kernels.rows import E4M3_MAX, SMALLEST

_MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST)
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_PDF_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton_op("prelora::gelu_quantize", mutates_args=())
def gelu_quantize(h: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = h.new_empty(len(h), columns, dtype=torch.float8_e4m3fn)
    scale = h.new_empty(len(h), 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    wrap_triton(_forward)[(len(h),)](h, values, scale, columns, h.stride(0), block, num_warps=_warps(block))
    return values, scale


@triton_op("prelora::gelu_quantize_backward", mutates_args=())
def gelu_quantize_backward(
    dg: torch.Tensor, h: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g, dh = (h.new_empty(len(h), columns, dtype=torch.bfloat16) for _ in range(2))
    values = h.new_empty(len(h), columns, dtype=torch.float8_e4m3fn)
    scale = h.new_empty(len(h), 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    strides = dg.stride(0), h.stride(0)
    wrap_triton(_backward)[(len(h),)](dg, h, g, dh, values, scale, columns, *strides, block, num_warps=_warps(block))
    return g, dh, values, scale


def _warps(block: int) -> int:
    """Sixteen values a thread, within what a kernel may have."""
    return min(16, max(1, block // 512))


@triton.jit
def _forward(h, values, scale, columns, h_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    x = tl.load(h + row * h_stride + column, mask=inside, other=0).to(tl.float32)
    g = x * 0.5 * (1 + tl.math.erf(x * _SQRT_HALF))
    s = tl.maximum(tl.max(tl.abs(g)), _SMALLEST) / _MAX
    tl.store(values + row * columns + column, (g * (1 / s)).to(values.dtype.element_ty), mask=inside)
    tl.store(scale + row, s)


@triton.jit
def _backward(dg, h, g, dh, values, scale, columns, dg_stride, h_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    x = tl.load(h + row * h_stride + column, mask=inside, other=0).to(tl.float32)
    d = tl.load(dg + row * dg_stride + column, mask=inside, other=0).to(tl.float32)
    cdf = 0.5 * (1 + tl.math.erf(x * _SQRT_HALF))
    d = d * (cdf + x * _PDF_AT_0 * tl.exp(-0.5 * x * x))
    s = tl.maximum(tl.max(tl.abs(d)), _SMALLEST) / _MAX
    at = row * columns + column
    tl.store(g + at, (x * cdf).to(tl.bfloat16), mask=inside)
    tl.store(dh + at, d.to(tl.bfloat16), mask=inside)
    tl.store(values + at, (d * (1 / s)).to(values.dtype.element_ty), mask=inside)
    tl.store(scale + row, s)
