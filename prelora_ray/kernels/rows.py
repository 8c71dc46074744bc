"""Rows of values in e4m3, each scaled by its own largest value."""

from __future__ import annotations

from typing import NamedTuple

import torch

E4M3_MAX = 448.0
SMALLEST = 1e-12
"""A row's largest value counts as at least this, so that a row of zeros has a scale."""


class Operand(NamedTuple):
    """A matrix, about values * scale."""

    values: torch.Tensor
    """(rows, columns) in e4m3."""
    scale: torch.Tensor
    """(rows, 1) in float32."""


def quantize(x: torch.Tensor) -> Operand:
    """x (rows, columns) in e4m3, each row scaled by its largest absolute value."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST) / E4M3_MAX
    return Operand((x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale)
