"""One micro-batch on the device: normalise, Mixup, CutMix, soft targets.

Partners and proportions are drawn per cell, on the CPU, by (seed, epoch, batch, cell), so they do not
depend on which worker or micro-batch a cell is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from prelora_ray.data.augment_settings import AugmentSettings
from prelora_ray.data.draws import Draw, generator
from prelora_ray.data.order import Ids


@dataclass(frozen=True)
class MixPlan:
    """For each of n slots: which one it is mixed with, and how."""

    offset: torch.Tensor
    """(n,), int64: the partner's slot less its own, both of one cell, so that a plan can be cut between cells."""
    weight: torch.Tensor
    """(n,), float64: share of the sample's own label; for Mixup of its own pixels too."""
    box: torch.Tensor
    """(n, 4), int64: top, left, bottom, right of what CutMix takes from the partner; all zero for Mixup."""


def plan_mixing(
    augment: AugmentSettings, seed: int, epoch: int, batch: int, cells: Sequence[int], size: int, ids: Ids, image_size: int
) -> MixPlan:
    """Draws the mixing of a worker's `cells`, `size` slots each, the first of `ids` (n,); -1 is an empty slot."""
    n = len(ids)
    offset, weight, box = np.zeros(n, np.int64), np.ones(n), np.zeros((n, 4), np.int64)
    if augment.mixes:
        for i, cell in enumerate(cells):
            slots = slice(i * size, (i + 1) * size)
            filled = int((ids[slots] >= 0).sum())  # a cell's rows stand at its front
            rng = generator(seed, Draw.MIX, epoch, batch, cell)
            if rng.random() >= augment.mix_probability or filled < 2:
                continue
            use_cutmix = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
            alpha = augment.cutmix if use_cutmix else augment.mixup
            share = rng.beta(alpha, alpha)
            offset[slots][:filled] = rng.permutation(filled) - np.arange(filled)
            if use_cutmix:
                side = image_size * np.sqrt(1 - share)
                y, x = rng.integers(image_size, size=2)
                edges = np.array([y - side / 2, x - side / 2, y + side / 2, x + side / 2])
                edges = edges.round().clip(0, image_size).astype(np.int64)
                box[slots] = edges
                share = 1 - (edges[2] - edges[0]) * (edges[3] - edges[1]) / image_size**2
            weight[slots] = share
    return MixPlan(*map(torch.from_numpy, (offset, weight, box)))


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 (n, height, width, 3) to normalised `dtype` (n, channels, height, width).

    There is a channel for each value of `mean`; a single one is the grey value.
    """
    if len(mean) == 1:
        images = _grey(images)
    shift, scale = _shift_and_scale(mean, std, dtype, images.device)
    return ((images.to(dtype) - shift) * scale).permute(0, 3, 1, 2).contiguous()


def denormalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """The other way round, to look at: uint8 (n, height, width, channels)."""
    shift, scale = _shift_and_scale(mean, std, images.dtype, images.device)
    return (images.permute(0, 2, 3, 1) / scale + shift).round().clamp(0, 255).to(torch.uint8)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """uint8 (..., 3) to the luma of ITU-R 601, int32 (..., 1) in 0..255: to the bit what Pillow's mode `L` is."""
    red, green, blue = images.int().split(1, dim=-1)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16  # 0.299, 0.587 and 0.114 of 2**16, rounded


@lru_cache
def _shift_and_scale(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    shift = torch.tensor([255 * m for m in mean], dtype=dtype, device=device)
    return shift, torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=device)


def soft_targets(labels: torch.Tensor, num_classes: int, label_smoothing: float, dtype: torch.dtype) -> torch.Tensor:
    """(n,) labels to (n, num_classes) targets; an empty slot (label -1) gets class 0."""
    targets = F.one_hot(labels.clamp(min=0), num_classes).to(dtype)
    return targets * (1 - label_smoothing) + label_smoothing / num_classes


def mix(images: torch.Tensor, targets: torch.Tensor, plan: MixPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes normalised images (n, channels, height, width) and soft targets (n, num_classes), all on one device."""
    device, dtype = images.device, images.dtype
    weight, box = plan.weight.to(dtype), plan.box
    y = torch.arange(images.shape[2], device=device)
    x = torch.arange(images.shape[3], device=device)
    rows = (y >= box[:, 0:1]) & (y < box[:, 2:3])
    columns = (x >= box[:, 1:2]) & (x < box[:, 3:4])
    inside = (rows[:, None, :, None] & columns[:, None, None, :]).to(dtype)
    is_cutmix = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
    own = torch.where(is_cutmix[:, None, None, None], 1 - inside, weight[:, None, None, None])
    partner = torch.arange(len(images), device=device) + plan.offset
    images = own * images + (1 - own) * images[partner]
    targets = weight[:, None] * targets + (1 - weight[:, None]) * targets[partner]
    return images, targets
