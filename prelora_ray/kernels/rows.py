"""Rows of values in e4m3, each scaled by its own largest value."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
SMALLEST = 1e-12
"""What a row's largest value counts as at least, so that a row of zeros has a scale."""


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) to e4m3 of the same shape and a float32 scale for each row, (rows, 1): x is about values * scale."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale
