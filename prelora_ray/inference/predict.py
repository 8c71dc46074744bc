"""What a trained model says of images."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import PIL.Image
import torch
from torch import nn

from prelora_ray.data.encode import BadImageError, encode, encode_image
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.errors import UserError, one_line
from prelora_ray.inference.preprocessing import Preprocessing
from prelora_ray.storage import Storage, absolute

Image = str | os.PathLike[str] | PIL.Image.Image
"""A file, by its path or its address in a bucket; or an image of Pillow's."""
_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image: its likeliest classes, the likeliest first."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Of each, in 0..1; those of all classes sum to 1."""

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """Of the likeliest class."""
        return self.probabilities[0]


def predict(
    module: nn.Module, classes: Sequence[str], preprocessing: Preprocessing, images: Sequence[Image], top: int
) -> list[Prediction]:
    """Classifies images; `TrainedModel.predict` says how."""
    if top < 1:
        raise UserError(f"top = {top} is not allowed: it must be a number of classes from 1 on")
    encoded = [_encoded(image, preprocessing) for image in images]
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    predictions = []
    for start in range(0, len(encoded), _BATCH):
        with torch.inference_mode():
            logits = module(preprocessing.read(encoded[start : start + _BATCH]).to(device))
        probabilities, labels = logits.double().softmax(1).topk(min(top, len(classes)))
        for shares, indices in zip(probabilities.tolist(), labels.tolist(), strict=True):
            predictions.append(Prediction(tuple(classes[i] for i in indices), tuple(shares)))
    return predictions


def is_image(value: object) -> TypeGuard[Image]:
    """Whether it is one image, and no list of them."""
    return isinstance(value, (str, os.PathLike, PIL.Image.Image))


def _encoded(image: Image, preprocessing: Preprocessing) -> bytes:
    """An image as `prepare` stores it, though not smaller than the model takes it."""
    if not is_image(image):
        raise UserError(f"images = {type(image).__name__} is not allowed: it must be a file, an image of Pillow's, or a list")
    prepare = PrepareSettings()
    size = max(prepare.size, preprocessing.shorter_side)
    try:
        if isinstance(image, PIL.Image.Image):
            return encode_image(image, size, prepare.max_pixels)
        folder, name = posixpath.split(absolute(image))
        return encode(Storage(folder).read_bytes(name), size, prepare.quality, prepare.max_pixels)
    except OSError as error:
        raise UserError(f"{str(image)!r} cannot be read: {error.strerror or one_line(error)}") from None
    except BadImageError as error:
        raise UserError(f"{str(image)!r} is no image that can be read: {error}") from None
