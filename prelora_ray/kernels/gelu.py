"""GELU between two products in e4m3, with the scaling by row behind it, in one pass over memory.

A compiler reads a row twice, once for its largest value, and computes GELU each time. On a GPU these are kernels in Triton that
keep the row in registers; elsewhere plain torch.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch

from prelora_ray.kernels.rows import Operand, quantize

if find_spec("triton"):  # torch's builds for GPUs bring it along
    from prelora_ray.kernels import gelu_triton


def gelu_quantize(h: torch.Tensor, columns: int) -> tuple[Operand, Operand]:
    """gelu(h) and h, each as `quantize` gives it, of the first so many columns of h, in bfloat16."""
    if h.is_cuda:
        values, scale, h_values, h_scale = gelu_triton.gelu_quantize(h, columns)
        return Operand(values, scale), Operand(h_values, h_scale)
    x = h[:, :columns].float()
    return quantize(x * _cdf(x)), quantize(x)


def gelu_quantize_backward(dg: torch.Tensor, h: Operand) -> tuple[torch.Tensor, torch.Tensor, Operand]:
    """The backward of g = gelu(h): g and dh, of h's shape in bfloat16, and dh as `quantize` gives it.

    Takes as many columns of dg as h has. Both come from h as `gelu_quantize` gave it: its slope there changes little within
    what e4m3 rounds off, and nothing else is kept from the forward.
    """
    if dg.is_cuda:
        g, dh, values, scale = gelu_triton.gelu_quantize_backward(dg, *h)
        return g, dh, Operand(values, scale)
    x = h.values.float() * h.scale
    cdf = _cdf(x)
    pdf = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    dh = dg[:, : x.shape[1]].float() * (cdf + x * pdf)
    return (x * cdf).bfloat16(), dh.bfloat16(), quantize(dh)


def _cdf(x: torch.Tensor) -> torch.Tensor:
    """Of the normal distribution."""
    return (1 + torch.erf(x * math.sqrt(0.5))) / 2
