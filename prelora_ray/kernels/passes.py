"""What stands between two products in e4m3, with the scaling by row behind it, each in one pass over memory.

A compiler reads a row twice, once for its largest value, and computes GELU each time; the sum over the rows, a bias's
gradient, is one more pass. On a GPU these are kernels in Triton that keep the row in registers; elsewhere plain torch.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch

from prelora_ray.kernels.rows import Operand, quantize

if find_spec("triton"):  # torch's builds for GPUs bring it along
    from prelora_ray.kernels import passes_triton


def gelu_quantize(h: torch.Tensor) -> Operand:
    """gelu(h) as `quantize` gives it, of h (rows, columns) in bfloat16."""
    if h.is_cuda:
        return Operand(*passes_triton.gelu_quantize(h))
    x = h.float()
    return quantize(x * _cdf(x))


def gelu_quantize_backward(dg: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Operand, torch.Tensor]:
    """The backward of g = gelu(h), of dg and h in bfloat16: g and dh in bfloat16, dh as `quantize` gives it, and the
    sum of its rows, (columns,) in float32."""
    if dg.is_cuda:
        g, dh, values, scale, total = passes_triton.gelu_quantize_backward(dg, h)
        return g, dh, Operand(values, scale), total
    g, dh = _backward(dg.float(), h.float())
    return g.bfloat16(), dh.bfloat16(), quantize(dh), dh.sum(0)


def gelu_quantize_both(h: torch.Tensor, columns: int) -> tuple[Operand, Operand]:
    """gelu(h) and h, each as `quantize` gives it, of the first so many columns of h, in bfloat16."""
    if h.is_cuda:
        values, scale, h_values, h_scale = passes_triton.gelu_quantize_both(h, columns)
        return Operand(values, scale), Operand(h_values, h_scale)
    x = h[:, :columns].float()
    return quantize(x * _cdf(x)), quantize(x)


def gelu_quantize_both_backward(dg: torch.Tensor, h: Operand) -> tuple[torch.Tensor, torch.Tensor, Operand]:
    """The backward of g = gelu(h): g and dh, of h's shape in bfloat16, and dh as `quantize` gives it.

    Takes as many columns of dg as h has. Both come from h as `gelu_quantize_both` gave it: its slope there changes
    little within what e4m3 rounds off, and nothing else is kept from the forward.
    """
    if dg.is_cuda:
        g, dh, values, scale = passes_triton.gelu_quantize_both_backward(dg, *h)
        return g, dh, Operand(values, scale)
    g, dh = _backward(dg[:, : h.values.shape[1]].float(), h.values.float() * h.scale)
    return g.bfloat16(), dh.bfloat16(), quantize(dh)


def quantize_and_sum(x: torch.Tensor) -> tuple[Operand, torch.Tensor]:
    """x (rows, columns), in bfloat16, as `quantize` gives it, and the sum of its rows, (columns,) in float32."""
    if x.is_cuda:
        values, scale, total = passes_triton.quantize_and_sum(x)
        return Operand(values, scale), total
    return quantize(x), x.sum(0, dtype=torch.float32)


def _backward(dg: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cdf = _cdf(x)
    pdf = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return x * cdf, dg * (cdf + x * pdf)


def _cdf(x: torch.Tensor) -> torch.Tensor:
    """Of the normal distribution."""
    return (1 + torch.erf(x * math.sqrt(0.5))) / 2
