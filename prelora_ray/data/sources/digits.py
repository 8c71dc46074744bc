"""scikit-learn's handwritten digits, which come inside its wheel."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from prelora_ray.data.sources.source import Found, Item, Source


def open_digits() -> Source:
    """1,797 images of 8 x 8 pixels."""
    found = Found("scikit-learn's digits", "digits")
    for i, label in enumerate(_digits()[1]):
        found.add(None, f"{i:04d}", int(label), (i,))
    return found.source(DigitsReader())


@dataclass(frozen=True)
class DigitsReader:
    def read(self, item: Item) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(_digits()[0][int(item.at[0])]).save(buffer, "PNG")
        return buffer.getvalue()


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 and (1797,) labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
