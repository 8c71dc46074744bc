"""The kernels of `passes.py`, which says what they compute. A program takes a row, whole; for sums, several in turn."""

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
_EXPONENT: tl.constexpr = tl.constexpr(-0.7213475204444817)
"""-1/2, for a power of 2 in place of e."""

_EACH = 32
"""Rows that a program sums before it writes their sum, a sixteenth of what it reads of them."""
_STAGES = 2
"""Of those, the rows in flight: one is read while the one before it is computed."""


@triton_op("prelora::gelu_quantize", mutates_args=())
def gelu_quantize(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = h.shape
    values, scale = _operand(h, columns)
    block = triton.next_power_of_2(columns)
    wrap_triton(_gelu)[(rows,)](h, values, scale, rows, columns, h.stride(0), block, num_warps=_warps(block))
    return values, scale


@triton_op("prelora::gelu_quantize_backward", mutates_args=())
def gelu_quantize_backward(
    dg: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = h.shape
    g, dh = (h.new_empty(rows, columns) for _ in range(2))
    values, scale = _operand(h, columns)
    programs, block = triton.cdiv(rows, _EACH), triton.next_power_of_2(columns)
    sums = h.new_empty(programs, columns, dtype=torch.float32)
    sizes = (rows, columns, dg.stride(0), h.stride(0), _EACH, _STAGES, block)
    wrap_triton(_gelu_backward)[(programs,)](dg, h, g, dh, values, scale, sums, *sizes, num_warps=_warps(block, values_each=8))
    return g, dh, values, scale, sums.sum(0)


@triton_op("prelora::gelu_quantize_both", mutates_args=())
def gelu_quantize_both(h: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values, scale = _operand(h, columns)
    h_values, h_scale = _operand(h, columns)
    block = triton.next_power_of_2(columns)
    wrap_triton(_gelu_both)[(len(h),)](
        h, values, scale, h_values, h_scale, len(h), columns, h.stride(0), block, num_warps=_warps(block)
    )
    return values, scale, h_values, h_scale


@triton_op("prelora::gelu_quantize_both_backward", mutates_args=())
def gelu_quantize_both_backward(
    dg: torch.Tensor, h_values: torch.Tensor, h_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = h_values.shape
    g, dh = (dg.new_empty(rows, columns, dtype=torch.bfloat16) for _ in range(2))
    values, scale = torch.empty_like(h_values), torch.empty_like(h_scale)
    block = triton.next_power_of_2(columns)
    wrap_triton(_gelu_both_backward)[(rows,)](
        dg, h_values, h_scale, g, dh, values, scale, rows, columns, dg.stride(0), block, num_warps=_warps(block, values_each=8)
    )
    return g, dh, values, scale


@triton_op("prelora::quantize_and_sum", mutates_args=())
def quantize_and_sum(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    values, scale = _operand(x, columns)
    programs, block = triton.cdiv(rows, _EACH), triton.next_power_of_2(columns)
    sums = x.new_empty(programs, columns, dtype=torch.float32)
    wrap_triton(_quantize_and_sum)[(programs,)](
        x, values, scale, sums, rows, columns, x.stride(0), _EACH, _STAGES, block, num_warps=_warps(block)
    )
    return values, scale, sums.sum(0)


def _operand(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for so many columns of x in e4m3, and for their scales."""
    return x.new_empty(len(x), columns, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


def _warps(block: int, values_each: int = 16) -> int:
    """For so many values a thread, within what a kernel may have.

    A kernel that writes 8 and 16 bits takes 8: of 16, Triton lays them out in two ways, and computes GELU for each.
    """
    return min(16, max(1, block // 32 // values_each))


@triton.jit
def _gelu(h, values, scale, rows, columns, h_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    x = tl.load(h + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
    cdf, _ = _normal(x)
    _store_quantized(x * cdf, values, scale, row, column, rows, columns)


@triton.jit
def _gelu_backward(
    dg, h, g, dh, values, scale, sums, rows, columns, dg_stride, h_stride,
    each: tl.constexpr, stages: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for i in tl.range(each, num_stages=stages):
        row = program * each + i
        inside = (column < columns) & (row < rows)
        at = row * columns + column
        x = tl.load(h + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dg + row * dg_stride + column, mask=inside, other=0.0).to(tl.float32)
        cdf, pdf = _normal(x)
        d = d * (cdf + x * pdf)
        total += d
        tl.store(g + at, (x * cdf).to(tl.bfloat16), mask=inside)
        tl.store(dh + at, d.to(tl.bfloat16), mask=inside)
        _store_quantized(d, values, scale, row, column, rows, columns)
    tl.store(sums + program * columns + column, total, mask=column < columns)


@triton.jit
def _gelu_both(h, values, scale, h_values, h_scale, rows, columns, h_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    x = tl.load(h + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
    cdf, _ = _normal(x)
    _store_quantized(x * cdf, values, scale, row, column, rows, columns)
    _store_quantized(x, h_values, h_scale, row, column, rows, columns)


@triton.jit
def _gelu_both_backward(dg, h_values, h_scale, g, dh, values, scale, rows, columns, dg_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    at = row * columns + column
    x = tl.load(h_values + at, mask=inside, other=0.0).to(tl.float32) * tl.load(h_scale + row)
    d = tl.load(dg + row * dg_stride + column, mask=inside, other=0.0).to(tl.float32)
    cdf, pdf = _normal(x)
    d = d * (cdf + x * pdf)
    tl.store(g + at, (x * cdf).to(tl.bfloat16), mask=inside)
    tl.store(dh + at, d.to(tl.bfloat16), mask=inside)
    _store_quantized(d, values, scale, row, column, rows, columns)


@triton.jit
def _quantize_and_sum(
    x, values, scale, sums, rows, columns, x_stride, each: tl.constexpr, stages: tl.constexpr, block: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for i in tl.range(each, num_stages=stages):
        row = program * each + i
        inside = (column < columns) & (row < rows)
        d = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        total += d
        _store_quantized(d, values, scale, row, column, rows, columns)
    tl.store(sums + program * columns + column, total, mask=column < columns)


@triton.jit
def _normal(x):
    """Distribution and density of the normal distribution at x, with one exponential for both: the tail is a polynomial
    times the density (Abramowitz and Stegun 7.1.26), off by 1e-7 at most."""
    e = tl.exp2(_EXPONENT * x * x)
    t = 1.0 / (1.0 + 0.3275911 * _SQRT_HALF * tl.abs(x))
    polynomial = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.5 * e * t * (0.254829592 + t * (-0.284496736 + t * polynomial))
    return tl.where(x < 0, tail, 1.0 - tail), _PDF_AT_0 * e


@triton.jit
def _store_quantized(x, values, scale, row, column, rows, columns):
    s = tl.maximum(tl.max(tl.abs(x)), _SMALLEST) / _MAX
    inside = (column < columns) & (row < rows)
    tl.store(values + row * columns + column, (x * (1 / s)).to(values.dtype.element_ty), mask=inside)
    tl.store(scale + row, s, mask=row < rows)
