"""The rows of prepared images, and what decoders make of them: uint8 pixels, augmented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from prelora_ray.data.augment import Augmentation, Augmenter, Pixels, undecodable
from prelora_ray.data.batch import Arrays, Columns, Decoder
from prelora_ray.data.damage import UndecodableError
from prelora_ray.data.manifest import Split
from prelora_ray.data.order import Ids

COLUMNS: Columns = {"image": pa.large_binary(), "label": pa.int64()}


@dataclass(frozen=True)
class ImageRows:
    """Encoded images and labels, which become `images` (n, size, size, 3), uint8, of the size that the epoch trains on,
    and `labels` (n,), int64, -1 where a slot is empty."""

    augmentation: Augmentation
    """Of evaluation, and of training where the epoch has none of its own."""
    seed: int
    crop_ratio: float
    training_augmentations: Mapping[int, Augmentation] = field(default_factory=dict)
    """By epoch, where training has another one than evaluation."""

    @property
    def columns(self) -> Columns:
        return COLUMNS

    def augmentation_of(self, split: Split, epoch: int) -> Augmentation:
        """What an epoch takes, whose images have this one's size."""
        return self.training_augmentations.get(epoch, self.augmentation) if split == "train" else self.augmentation

    def row_bytes(self, split: Split, epoch: int) -> int:
        return _num_bytes(self.augmentation_of(split, epoch))

    @property
    def all_row_bytes(self) -> set[int]:
        return {_num_bytes(augmentation) for augmentation in (self.augmentation, *self.training_augmentations.values())}

    def decoder(self) -> Decoder:
        return _ImageDecoder(self)


def _num_bytes(augmentation: Augmentation) -> int:
    return 3 * augmentation.image_size**2


class _ImageDecoder:
    def __init__(self, rows: ImageRows) -> None:
        self._rows = rows
        augmentations = {rows.augmentation, *rows.training_augmentations.values()}
        self._augmenters = {each: Augmenter(each, rows.seed, rows.crop_ratio) for each in augmentations}

    def __call__(self, split: Split, epoch: int, ids: Ids, columns: Mapping[str, pa.Array]) -> Arrays:
        augmenter = self._augmenters[self._rows.augmentation_of(split, epoch)]
        size = augmenter.augmentation.image_size
        filled = np.flatnonzero(ids >= 0)
        labels = np.full(len(ids), -1)
        labels[filled] = columns["label"].to_numpy()
        images = np.zeros((len(ids), size, size, 3), np.uint8)
        for slot, content in zip(filled, columns["image"], strict=True):
            images[slot] = _pixels(augmenter, split, epoch, int(ids[slot]), content.as_py())
        return {"images": images, "labels": labels}


def _pixels(augmenter: Augmenter, split: Split, epoch: int, sample: int, encoded: bytes) -> Pixels:
    try:
        if split == "train":
            return augmenter.train(encoded, epoch, sample)
        return augmenter.evaluate(encoded)
    except Exception:
        if (reason := undecodable(encoded)) is None:
            raise
        raise UndecodableError(sample, reason) from None
