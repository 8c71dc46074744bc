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
def gelu_quantize(h: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values, h_values = (h.new_empty(len(h), columns, dtype=torch.float8_e4m3fn) for _ in range(2))
    scale, h_scale = (h.new_empty(len(h), 1, dtype=torch.float32) for _ in range(2))
    block = triton.next_power_of_2(columns)
    wrap_triton(_forward)[(len(h),)](h, values, scale, h_values, h_scale, columns, h.stride(0), block, num_warps=_warps(block))
    return values, scale, h_values, h_scale


@triton_op("prelora::gelu_quantize_backward", mutates_args=())
def gelu_quantize_backward(
    dg: torch.Tensor, h_values: torch.Tensor, h_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = h_values.shape
    g, dh = (dg.new_empty(rows, columns, dtype=torch.bfloat16) for _ in range(2))
    values, scale = torch.empty_like(h_values), torch.empty_like(h_scale)
    block = triton.next_power_of_2(columns)
    wrap_triton(_backward)[(rows,)](
        dg, h_values, h_scale, g, dh, values, scale, columns, dg.stride(0), block, num_warps=_warps(block)
    )
    return g, dh, values, scale


def _warps(block: int) -> int:
    """Sixteen values a thread, within what a kernel may have."""
    return min(16, max(1, block // 512))


@triton.jit
def _forward(h, values, scale, h_values, h_scale, columns, h_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    x = tl.load(h + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(x * 0.5 * (1 + tl.math.erf(x * _SQRT_HALF)), values, scale, row, column, columns)
    _store_quantized(x, h_values, h_scale, row, column, columns)


@triton.jit
def _backward(dg, h_values, h_scale, g, dh, values, scale, columns, dg_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    at = row * columns + column
    x = tl.load(h_values + at, mask=inside, other=0.0).to(tl.float32) * tl.load(h_scale + row)
    d = tl.load(dg + row * dg_stride + column, mask=inside, other=0.0).to(tl.float32)
    cdf = 0.5 * (1 + tl.math.erf(x * _SQRT_HALF))
    d = d * (cdf + x * _PDF_AT_0 * tl.exp(-0.5 * x * x))
    tl.store(g + at, (x * cdf).to(tl.bfloat16), mask=inside)
    tl.store(dh + at, d.to(tl.bfloat16), mask=inside)
    _store_quantized(d, values, scale, row, column, columns)


@triton.jit
def _store_quantized(x, values, scale, row, column, columns):
    s = tl.maximum(tl.max(tl.abs(x)), _SMALLEST) / _MAX
    tl.store(values + row * columns + column, (x * (1 / s)).to(values.dtype.element_ty), mask=column < columns)
    tl.store(scale + row, s)
