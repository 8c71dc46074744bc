"""scikit-learn's handwritten digits, which come inside its wheel."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.source import Item


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8 x 8 pixels."""

    classes: tuple[str, ...] = tuple("0123456789")
    items: dict[Split, list[Item]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.items["train"] = [Item(f"{i:04d}", int(label)) for i, label in enumerate(_digits()[1])]

    def read(self, item: Item) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(_digits()[0][int(item.name)]).save(buffer, "PNG")
        return buffer.getvalue()


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 and (1797,) labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
