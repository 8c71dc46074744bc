"""GELU between two products in e4m3: adds the bias in front of it and scales by row behind it, all in one pass over memory.

A compiler reads a row twice, once for its largest value, and computes GELU each time. On a GPU these are kernels in Triton that
keep the row in registers; elsewhere plain torch.
"""

from __future__ import annotations

import math

import torch

from prelora_ray.kernels.rows import quantize

if torch.cuda.is_available():  # torch's builds for CUDA bring Triton along
    from prelora_ray.kernels import gelu_triton


def gelu_quantize(h: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu(h + bias) as `quantize` gives it, of h (rows, columns or more) and bias (columns,); further columns are left out."""
    if h.is_cuda:
        values, scale = gelu_triton.gelu_quantize(h, bias)
        return values, scale
    x = h[:, : len(bias)].float() + bias.float()
    return quantize(x * _cdf(x))


def gelu_quantize_backward(
    dg: torch.Tensor, h: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward of g = gelu(h + bias): g and dh, (rows, columns) in bfloat16, and dh as `quantize` gives it.

    dg and h have these columns or more. g comes from h again, so that nothing wider than h is kept from the forward.
    """
    if h.is_cuda:
        g, dh, values, scale = gelu_triton.gelu_quantize_backward(dg, h, bias)
        return g, dh, values, scale
    x = h[:, : len(bias)].float() + bias.float()
    cdf = _cdf(x)
    pdf = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    dh = dg[:, : len(bias)].float() * (cdf + x * pdf)
    return (x * cdf).bfloat16(), dh.bfloat16(), *quantize(dh)


def _cdf(x: torch.Tensor) -> torch.Tensor:
    """Of the normal distribution."""
    return (1 + torch.erf(x * math.sqrt(0.5))) / 2
