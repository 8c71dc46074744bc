"""JPEG files like ImageNet's to measure with: crops of scikit-learn's two photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

_SIDES = ((500, 375), (375, 500), (500, 333), (500, 500), (400, 300), (333, 500))
"""Width and height of the images; 500 x 375 is ImageNet's most frequent size."""
_PHOTOGRAPH = (960, 641)


def write_images(folder: Path, count: int) -> None:
    """`count` training images of two classes, and 16 for validation, in folders as `prelora prepare` reads them."""
    photographs = [Image.fromarray(pixels).resize(_PHOTOGRAPH) for pixels in load_sample_images()["images"]]
    rng = np.random.default_rng(0)
    for i in range(count + 16):
        width, height = _SIDES[i % len(_SIDES)]
        left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(_PHOTOGRAPH, (width, height), strict=True))
        path = folder / ("train" if i < count else "val") / "ab"[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photographs[i % 2].crop((left, top, left + width, top + height)).save(path, quality=95)
