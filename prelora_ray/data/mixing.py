"""One micro-batch on the device: normalise, Mixup, CutMix, soft targets.

Partners and proportions are drawn per cell, on the CPU, by (seed, epoch, batch, cell), so they do not
depend on which worker or micro-batch a cell is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from prelora_ray.data.draws import Draw, generator
from prelora_ray.data.order import Ids


@dataclass(frozen=True)
class Mixing:
    mixup: float = 0.0
    """Alpha of Mixup's Beta distribution (arXiv 1710.09412); 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution (arXiv 1905.04899); 0 is off. With both, each cell takes one of them."""
    probability: float = 1.0
    """Probability that a cell is mixed at all."""
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class MixPlan:
    """For each of a worker's n slots: with whom it is mixed, and how."""

    partner: Ids
    """(n,): slot of the partner, in the same cell."""
    weight: NDArray[np.float64]
    """(n,): share of the sample's own label; for Mixup of its own pixels too."""
    box: NDArray[np.int64]
    """(n, 4): top, left, bottom, right of what CutMix takes from the partner; all zero for Mixup."""

    def __getitem__(self, slots: slice) -> MixPlan:
        """The plan of a micro-batch of whole cells."""
        return MixPlan(self.partner[slots] - (slots.start or 0), self.weight[slots], self.box[slots])


def plan_mixing(
    mixing: Mixing, seed: int, epoch: int, batch: int, cells: Sequence[int], size: int, ids: Ids, image_size: int
) -> MixPlan:
    """Draws the mixing of a worker's `cells`, of `size` slots each, at the front of `ids` (n,), -1 where a slot is empty."""
    n = len(ids)
    partner, weight, box = np.arange(n), np.ones(n), np.zeros((n, 4), np.int64)
    if mixing.mixup or mixing.cutmix:
        for i, cell in enumerate(cells):
            slots = slice(i * size, (i + 1) * size)
            filled = int((ids[slots] >= 0).sum())  # a cell's rows stand at its front
            rng = generator(seed, Draw.MIX, epoch, batch, cell)
            if rng.random() >= mixing.probability or filled < 2:
                continue
            use_cutmix = mixing.cutmix > 0 and (mixing.mixup == 0 or rng.random() < 0.5)
            alpha = mixing.cutmix if use_cutmix else mixing.mixup
            share = rng.beta(alpha, alpha)
            partner[slots][:filled] = i * size + rng.permutation(filled)
            if use_cutmix:
                side = image_size * np.sqrt(1 - share)
                y, x = rng.integers(image_size, size=2)
                edges = np.array([y - side / 2, x - side / 2, y + side / 2, x + side / 2])
                edges = edges.round().clip(0, image_size).astype(np.int64)
                box[slots] = edges
                share = 1 - (edges[2] - edges[0]) * (edges[3] - edges[1]) / image_size**2
            weight[slots] = share
    return MixPlan(partner, weight, box)


def normalize(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 (n, height, width, 3) to normalised `dtype` (n, 3, height, width)."""
    shift = torch.tensor([255 * m for m in mean], dtype=dtype, device=images.device)
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=images.device)
    return ((images.to(dtype) - shift) * scale).permute(0, 3, 1, 2).contiguous()


def mix(
    images: torch.Tensor, labels: torch.Tensor, plan: MixPlan, num_classes: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images and soft targets (n, num_classes); an empty slot (label -1) gets class 0."""
    device, dtype = images.device, images.dtype
    targets = F.one_hot(labels.clamp(min=0), num_classes).to(dtype)
    targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
    if (plan.weight == 1).all():
        return images, targets
    partner = torch.from_numpy(plan.partner).to(device)
    weight = torch.from_numpy(plan.weight).to(device, dtype)
    box = torch.from_numpy(plan.box).to(device)
    y = torch.arange(images.shape[2], device=device)
    x = torch.arange(images.shape[3], device=device)
    rows = (y >= box[:, 0:1]) & (y < box[:, 2:3])
    columns = (x >= box[:, 1:2]) & (x < box[:, 3:4])
    inside = (rows[:, None, :, None] & columns[:, None, None, :]).to(dtype)
    is_cutmix = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
    own = torch.where(is_cutmix[:, None, None, None], 1 - inside, weight[:, None, None, None])
    images = own * images + (1 - own) * images[partner]
    targets = weight[:, None] * targets + (1 - weight[:, None]) * targets[partner]
    return images, targets
