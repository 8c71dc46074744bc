"""One image: decode, crop, flip, colour, erase. On the CPU, uint8 in and out, keyed by the sample."""

from __future__ import annotations

import importlib.util
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, UnidentifiedImageError

from prelora_ray.data.augment_settings import AugmentSettings
from prelora_ray.data.draws import Draw, generator
from prelora_ray.errors import one_line

FORMATS = ("JPEG", "PNG")
"""What `prepare` stores; no other decoder of Pillow's gets to see a stored image."""
Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
_MARGIN = 8
"""Pixels around a box that resizing may use: two of the result's, each of which is less than two of the source's."""
_KEPT_BYTES = 2**25
"""Pixels that an augmenter keeps for the next epochs: 43,690 images of 16 pixels, 10,922 of 32."""


@dataclass(frozen=True)
class Augmentation:
    """What an image becomes. All that varies it is drawn by (seed, epoch, sample) alone."""

    image_size: int
    """Side of the square image that comes out, in pixels."""
    mean: tuple[float, ...]
    """Mean of the channels, in 0..1: the middle of the noise that erasing fills in."""
    std: tuple[float, ...]
    settings: AugmentSettings = field(default_factory=AugmentSettings)


class Augmenter:
    """Turns encoded images into training and evaluation images of (image_size, image_size, 3)."""

    def __init__(self, augmentation: Augmentation, seed: int, crop_ratio: float) -> None:
        """`crop_ratio`: share of the shorter side that evaluation keeps in its centre crop."""
        self.augmentation = augmentation
        self.seed = seed
        self.crop_ratio = crop_ratio
        self._color = _color_transforms(augmentation)
        self._kept: dict[int, bytes] = {}

    def train(self, encoded: bytes, epoch: int, sample: int) -> Pixels:
        """The training image of a sample in an epoch. `encoded` is the same each time that `sample` is."""
        options, size = self.augmentation.settings, self.augmentation.image_size
        rng = generator(self.seed, Draw.AUGMENT, epoch, sample)
        if options.crop == "random_resized":
            image = read_crop(encoded, size, lambda width, height: random_resized_box(width, height, options.min_scale, rng))
        else:
            image = self._whole(encoded, sample)
            if options.crop == "padded":
                image = _padded_crop(image, options.padding, rng)
        if rng.random() < options.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._color:
            seed = int(rng.integers(2**32))
            random.seed(seed)  # the transforms draw from the global generators: set these by the sample's key
            np.random.seed(seed)
            for transform in self._color:
                image = transform(image)
        pixels = np.array(image)
        if rng.random() < options.erase:
            self._erase(pixels, rng)
        return pixels

    def evaluate(self, encoded: bytes) -> Pixels:
        """The image that evaluation takes: resized, centre-cropped, nothing drawn."""
        box = lambda width, height: center_box(width, height, self.crop_ratio)  # noqa: E731
        return np.array(read_crop(encoded, self.augmentation.image_size, box))

    def _whole(self, encoded: bytes, sample: int) -> Image.Image:
        """The largest square in the image's centre, resized.

        No epoch's differs, and of a small image it is most of what decoding costs: as many as there is room for are
        kept. Which ones does not matter, as each comes once an epoch.
        """
        size = self.augmentation.image_size
        if sample in self._kept:
            return Image.frombytes("RGB", (size, size), self._kept[sample])
        image = read_crop(encoded, size, lambda width, height: center_box(width, height, 1.0))
        if (len(self._kept) + 1) * 3 * size**2 <= _KEPT_BYTES:
            self._kept[sample] = image.tobytes()
        return image

    def _erase(self, pixels: Pixels, rng: np.random.Generator) -> None:
        """Random erasing (arXiv 1708.04896): one rectangle of 2 to 33 % of the area becomes noise."""
        height, width = pixels.shape[:2]
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                noise = rng.normal(self.augmentation.mean, self.augmentation.std, (h, w, 3)) * 255
                pixels[top : top + h, left : left + w] = noise.clip(0, 255).round()
                return


def read_crop(encoded: bytes, size: int, choose_box: Callable[[int, int], Box]) -> Image.Image:
    """The part of an image inside a box, in RGB, resized to `size` x `size`.

    `choose_box` gets the image's width and height. A JPEG is decoded at the smallest scale (1, 1/2, 1/4, 1/8) that
    leaves the box `size` pixels on each side, which costs a fraction of the whole image's decoding.
    """
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)  # reads its header alone
    width, height = image.size
    box = left, top, right, bottom = choose_box(width, height)
    fits = min(right - left, bottom - top) / size
    shrink = next((shrink for shrink in (8, 4, 2) if shrink <= fits), 1)  # libjpeg is slow at what lies between
    sides = {"min_height": math.ceil(height / shrink), "min_width": math.ceil(width / shrink)}
    try:
        pixels = simplejpeg.decode_jpeg(encoded, "RGB", **sides)
    except ValueError:  # no JPEG, or one with a flaw that Pillow overlooks
        return _resize(image.convert("RGB"), size, box)
    left, top = left / shrink, top / shrink
    right, bottom = min(right / shrink, pixels.shape[1]), min(bottom / shrink, pixels.shape[0])
    x, y = max(0, int(left) - _MARGIN), max(0, int(top) - _MARGIN)
    part = Image.fromarray(pixels[y : math.ceil(bottom) + _MARGIN, x : math.ceil(right) + _MARGIN])
    return _resize(part, size, (left - x, top - y, right - x, bottom - y))


def undecodable(encoded: bytes) -> str | None:
    """Why a stored image cannot be decoded, in one line; None where it can."""
    try:
        Image.open(io.BytesIO(encoded), formats=FORMATS).load()
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "it is no JPEG or PNG"
    except Exception as error:  # what a decoder raises over broken bytes is anything
        return one_line(error)
    return None


def _resize(image: Image.Image, size: int, box: Box) -> Image.Image:
    if image.size == (size, size) and box == (0, 0, size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def random_resized_box(width: int, height: int, min_scale: float, rng: np.random.Generator) -> Box:
    """Box (left, top, right, bottom) of a random area and aspect ratio (3/4 to 4/3), as Inception crops."""
    for _ in range(10):
        area = rng.uniform(min_scale, 1.0) * width * height
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # A very long image: the largest centre crop with an allowed aspect ratio.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_box(width: int, height: int, crop_ratio: float) -> Box:
    """Box of the centre square of `crop_ratio` x the shorter side."""
    side = min(width, height) * crop_ratio
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _padded_crop(image: Image.Image, padding: int, rng: np.random.Generator) -> Image.Image:
    dx, dy = (int(d) for d in rng.integers(0, 2 * padding + 1, 2) - padding)
    return image.crop((dx, dy, dx + image.width, dy + image.height))  # Pillow fills what lies outside with black


def _color_transforms(augmentation: Augmentation) -> list[Callable[[Image.Image], Image.Image]]:
    """RandAugment or 3-Augment from timm, and colour jitter."""
    transforms: list[Callable[[Image.Image], Image.Image]] = []
    policy, color_jitter = augmentation.settings.policy, augmentation.settings.color_jitter
    if policy:
        timm = _timm_policies()
        make = timm.rand_augment_transform if policy.startswith("rand") else timm.auto_augment_transform
        mean = tuple(round(255 * channel) for channel in augmentation.mean)
        transforms.append(make(policy, {"img_mean": mean, "translate_const": augmentation.image_size * 0.45}))
    if color_jitter:
        transforms.append(ColorJitter(color_jitter))
    return transforms


def _timm_policies() -> ModuleType:
    """timm's `data/auto_augment.py` without timm.

    The file needs Pillow and numpy; the package around it needs torch, which costs each decoder seconds and 400 MB.
    """
    package = importlib.util.find_spec("timm")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("_timm_policies", Path(package.origin).parent / "data" / "auto_augment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ColorJitter:
    """torchvision's ColorJitter of brightness, contrast and saturation alike, without torch.

    Each is changed by a factor from 1 - `strength` to 1 + `strength`, in an order that is drawn too.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, image: Image.Image) -> Image.Image:
        for enhance in random.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
            image = enhance(image).enhance(random.uniform(max(0.0, 1 - self.strength), 1 + self.strength))
        return image
