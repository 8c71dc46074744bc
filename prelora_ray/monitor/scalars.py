"""What loggers show of a run: its scalars by tag, its settings, and a sheet of images."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt

from prelora_ray.config import Settings, flat
from prelora_ray.method.phases import Phase
from prelora_ray.records import EpochLine, WindowLine

Pixels = npt.NDArray[np.uint8]
Scalars = dict[str, float]

_FROM_EPOCHS = {
    "loss/train": "loss",
    "loss/val": "val_loss",
    "accuracy/val_top1": "val_top1",
    "accuracy/val_top5": "val_top5",
    "accuracy/ema_top1": "ema_top1",
    "accuracy/val_accuracy": "val_accuracy",
    "loss/val_perplexity": "val_perplexity",
    "loss/ema_perplexity": "ema_perplexity",
    "speed/images_per_second": "images_per_second",
    "speed/epoch_seconds": "seconds",
    "speed/data_wait_seconds": "data_wait_seconds",
    "memory/peak_bytes": "peak_memory_bytes",
    "run/learning_rate": "learning_rate",
    "run/trainable_parameters": "trainable_parameters",
    "run/world_size": "world_size",
    "run/image_size": "image_size",
}
"""Scalars, by the fields of an EpochLine that hold them."""
_BORDER = 2


def tag_of(key: str) -> str:
    """The scalar that a field of an EpochLine is shown as."""
    return next(tag for tag, field in _FROM_EPOCHS.items() if field == key)


def epoch_scalars(line: EpochLine) -> Scalars:
    """Of an epoch; their step is the number of completed epochs, `line.epoch + 1`."""
    phase = list(Phase).index(Phase(line.phase))
    return _known({tag: getattr(line, key) for tag, key in _FROM_EPOCHS.items()} | {"run/phase": phase})


def window_scalars(line: WindowLine) -> Scalars:
    """Of a window of the test; their step is `line.epoch_end`."""
    changes = {f"norm_change_percent/{family}": change for family, change in (line.change or {}).items()}
    return _known({**changes, "loss_change_percent": line.loss_change})


def _known(values: dict[str, float | None]) -> Scalars:
    return {tag: value for tag, value in values.items() if value is not None}


def settings_in_words(settings: Settings) -> dict[str, str]:
    """The value of every key, as a recipe has it."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat(settings).items()}


def sheet(images: Pixels) -> Pixels:
    """Images (n, height, width, channels) side by side, as one image that is about as many wide as high."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    page = np.zeros((rows * (height + _BORDER), columns * (width + _BORDER), channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + _BORDER), i % columns * (width + _BORDER)
        page[top : top + height, left : left + width] = image
    return page
