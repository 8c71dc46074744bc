"""The kernels of `gelu.py`, which says what they compute. A program takes some rows, one after the other, each whole."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from prelora_ray.kernels.rows import E4M3_MAX, SMALLEST

_ROWS = 4
"""Of a program: the bias is read once for them."""
_MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST)
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_PDF_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton_op("prelora::gelu_quantize", mutates_args=())
def gelu_quantize(h: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = len(h), len(bias)
    values = h.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = h.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    grid = (triton.cdiv(rows, _ROWS),)
    wrap_triton(_forward)[grid](h, bias, values, scale, rows, columns, h.stride(0), _ROWS, block, num_warps=_warps(block))
    return values, scale


@triton_op("prelora::gelu_quantize_backward", mutates_args=())
def gelu_quantize_backward(
    dg: torch.Tensor, h: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = len(h), len(bias)
    g, dh = (h.new_empty(rows, columns, dtype=torch.bfloat16) for _ in range(2))
    values = h.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = h.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    grid = (triton.cdiv(rows, _ROWS),)
    strides = dg.stride(0), h.stride(0)
    wrap_triton(_backward)[grid](
        dg, h, bias, g, dh, values, scale, rows, columns, *strides, _ROWS, block, num_warps=_warps(block)
    )
    return g, dh, values, scale


def _warps(block: int) -> int:
    """Sixteen values a thread, within what a kernel may have."""
    return min(16, max(1, block // 512))


@triton.jit
def _forward(h, bias, values, scale, rows, columns, h_stride, rows_each: tl.constexpr, block: tl.constexpr):
    column = tl.arange(0, block)
    inside = column < columns
    b = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    for i in tl.static_range(rows_each):
        row = tl.program_id(0).to(tl.int64) * rows_each + i
        here = inside & (row < rows)
        x = tl.load(h + row * h_stride + column, mask=here, other=0).to(tl.float32) + b
        g = x * 0.5 * (1 + tl.math.erf(x * _SQRT_HALF))
        s = tl.maximum(tl.max(tl.abs(g)), _SMALLEST) / _MAX
        tl.store(values + row * columns + column, (g * (1 / s)).to(values.dtype.element_ty), mask=here)
        tl.store(scale + row, s, mask=row < rows)


@triton.jit
def _backward(
    dg,
    h,
    bias,
    g,
    dh,
    values,
    scale,
    rows,
    columns,
    dg_stride,
    h_stride,
    rows_each: tl.constexpr,
    block: tl.constexpr,
):
    column = tl.arange(0, block)
    inside = column < columns
    b = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    for i in tl.static_range(rows_each):
        row = tl.program_id(0).to(tl.int64) * rows_each + i
        here = inside & (row < rows)
        x = tl.load(h + row * h_stride + column, mask=here, other=0).to(tl.float32) + b
        d = tl.load(dg + row * dg_stride + column, mask=here, other=0).to(tl.float32)
        cdf = 0.5 * (1 + tl.math.erf(x * _SQRT_HALF))
        d = d * (cdf + x * _PDF_AT_0 * tl.exp(-0.5 * x * x))
        s = tl.maximum(tl.max(tl.abs(d)), _SMALLEST) / _MAX
        at = row * columns + column
        tl.store(g + at, (x * cdf).to(tl.bfloat16), mask=here)
        tl.store(dh + at, d.to(tl.bfloat16), mask=here)
        tl.store(values + at, (d * (1 / s)).to(values.dtype.element_ty), mask=here)
        tl.store(scale + row, s, mask=row < rows)
