"""What becomes of an image before a trained model takes it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from prelora_ray.data.augment import Augmentation, Augmenter
from prelora_ray.data.mixing import normalize


@dataclass(frozen=True)
class Preprocessing:
    image_size: int
    mean: tuple[float, ...]
    """Of each channel that the model takes: three, or one, which is the grey value."""
    std: tuple[float, ...]
    crop_ratio: float
    """Share of the shorter side in the centre crop."""

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.image_size, self.mean, self.std)

    @property
    def shorter_side(self) -> int:
        """Of an image, in pixels, from which the model's input is not enlarged."""
        return math.ceil(self.image_size / self.crop_ratio)

    def read(self, encoded: Iterable[bytes]) -> torch.Tensor:
        """Stored images as evaluation takes them, normalised, (n, channels, image_size, image_size)."""
        augmenter = Augmenter(self.augmentation, seed=0, crop_ratio=self.crop_ratio)
        pixels = torch.stack([torch.from_numpy(augmenter.evaluate(content)) for content in encoded])
        return normalize(pixels, self.mean, self.std)
