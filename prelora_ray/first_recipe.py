"""`prelora init`: a first recipe for images, chosen by their number and size, which says why it is as it is."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prelora_ray.config_file import parse_settings
from prelora_ray.data.augment import Augmentation, Augmenter
from prelora_ray.data.encode import encode
from prelora_ray.data.manifest import is_prepared, read_manifest
from prelora_ray.data.prepare import UNREADABLE, check_storage_answered, open_for, plan
from prelora_ray.data.prepare_settings import NAMED_SOURCES, PrepareSettings
from prelora_ray.data.rows import read_encoded
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage, absolute, check_local, check_out_folder
from prelora_ray.words import counted

_SAMPLE = 2000
"""Most images that are looked at; the order of prepared images is a random one."""
_LARGEST = 224
"""Side of the largest input that is chosen, in pixels: that of timm's names."""


@dataclass(frozen=True)
class Images:
    """What a recipe is chosen by."""

    train: int
    """Training images; in a source, unreadable ones included."""
    classes: int
    encoded: list[bytes]
    """Some of the training images, as they are stored."""

    @property
    def shorter_sides(self) -> list[int]:
        return sorted(min(Image.open(io.BytesIO(content)).size) for content in self.encoded)


@dataclass(frozen=True)
class _Scale:
    """What goes by the number of training images."""

    below: float
    """Training images, for fewer than which it is meant."""
    model: str
    options: dict[str, int]
    told: str
    """The model's name and size, for a person."""
    batch_size: int
    epochs: int
    learning_rate: float
    zeta: float
    ranks: tuple[int, int]


_SMALLEST = {"embed_dim": 64, "depth": 6, "num_heads": 4}
_SCALES = (
    _Scale(5_000, "vit_tiny_patch16_224", _SMALLEST, "a third of a million parameters", 64, 100, 2e-3, 12.0, (4, 32)),
    _Scale(40_000, "vit_tiny_patch16_224", {}, "ViT-Ti, 5.5 million parameters", 128, 200, 1e-3, 5.0, (8, 64)),
    _Scale(200_000, "vit_small_patch16_224", {}, "ViT-S, 22 million parameters", 256, 120, 1e-3, 5.0, (8, 64)),
    _Scale(5_000_000, "vit_small_patch16_224", {}, "ViT-S, 22 million parameters", 1024, 90, 1e-3, 5.0, (8, 64)),
    _Scale(math.inf, "vit_base_patch16_224", {}, "ViT-B, 86 million parameters", 1024, 30, 1e-3, 5.0, (8, 64)),
)


def write_recipe(file: str, data: str, on_progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Writes a recipe for a prepared folder, or for whatever `prelora prepare` takes, and returns its text.

    `on_progress` is called with the images looked at and their number. Raises UserError where `file` is there already
    or cannot be a recipe, or `data` are no images to train on.
    """
    check_local(file)
    path = Path(absolute(file))
    check_out_folder(str(path.parent))
    parse_settings({"name": path.stem, "data": {"path": data}})  # raises, before any image is read
    if path.exists():
        raise UserError(f"{file} is there already: give a new file")
    is_ready = data not in NAMED_SOURCES and is_prepared(Storage(data))
    folder = data if is_ready else f"data/{path.stem}"
    images = read_prepared(data) if is_ready else read_source(data, folder, on_progress)
    text = compose(file, folder, None if is_ready else data, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text


def read_prepared(data: str) -> Images:
    """Raises UserError where the folder is not whole, or has no training images."""
    manifest = read_manifest(Storage(data))
    if manifest.text is not None:
        raise UserError(f"{data!r} holds text, and a first recipe is for images: begin with jobs/configs/text.yaml")
    if not manifest.num_images("train"):
        raise UserError(f"{data!r} has no training images")
    encoded = read_encoded(data, manifest.splits["train"], _SAMPLE)
    return Images(manifest.num_images("train"), len(manifest.classes), encoded)


def read_source(source: str, out: str, on_progress: Callable[[int, int], None]) -> Images:
    """Of images that are to be prepared into `out`. Raises UserError as `prepare` does, or where none can be
    read; OSError where the storage fails."""
    settings = PrepareSettings()
    opened = open_for(source, out, settings)
    tasks = [task for task in plan(opened, out, settings) if task.split == "train"]
    items = [(task.reader, item) for task in tasks for item in task.items]
    sample = items[:_SAMPLE]
    encoded = []
    for done, (reader, item) in enumerate(sample, 1):
        try:
            encoded.append(encode(reader.read(item), settings.size, settings.quality, settings.max_pixels))
        except UNREADABLE as error:
            check_storage_answered(error)  # `prepare` tells which images are bad, and why
        finally:
            on_progress(done, len(sample))
    if not encoded:
        raise UserError(f"{source!r} has no training image that can be read, of {len(sample)} that were tried")
    return Images(len(items), len(opened.classes), encoded)


def compose(file: str, path: str, source: str | None, images: Images) -> str:
    """The recipe's text. `path`: the prepared folder; `source`: what is prepared into it on first use."""
    sides = images.shorter_sides
    middle = int(statistics.median_low(sides))
    scale = next(scale for scale in _SCALES if images.train < scale.below)
    patch = 16 if middle >= 160 else 8 if middle >= 64 else 4 if middle >= 24 else 2
    size = max(2, min(middle, _LARGEST) // patch) * patch
    crop_ratio = 0.875 if size == _LARGEST else 1.0
    mean, std = measure(images.encoded, size, crop_ratio)
    options = ({} if patch == 16 else {"patch_size": patch}) | scale.options
    told = f"{sides[0]}" if sides[0] == sides[-1] else f"{sides[0]} to {sides[-1]}, half of them below {middle + 1}"
    of_sample = "all of them" if len(images.encoded) == images.train else f"{len(images.encoded):,} of them"
    batches = -(-images.train // scale.batch_size)
    return "\n".join(
        [
            f"# Command:   prelora train {file}        (first: --dry-run, then --fast)",
            f"# Data:      {counted(images.train, 'training image')} of {counted(images.classes, 'class', 'classes')}; "
            f"shorter sides in pixels: {told}",
            f"# Cost:      prelora plan {file}" + ("" if source is None else f" --images {images.train}"),
            "#",
            "# Written by `prelora init`. Each choice is a first guess from the number and the size of the images: change it.",
            "data:",
            f"  path: {json.dumps(path)}",
            *([] if source is None else [f"  source: {json.dumps(source)}  # prepared into path on first use"]),
            f"  batch_size: {scale.batch_size}  # {batches:,} an epoch",
            f"  # Of the training images as the model takes them, measured over {of_sample}.",
            f"  mean: {json.dumps(mean)}",
            f"  std: {json.dumps(std)}",
            *_crop_ratio(crop_ratio),
            "model:",
            f"  # {scale.told}, for {_range(scale)} training images; {(size // patch) ** 2} patches of {patch} x {patch}.",
            f"  name: {scale.model}",
            f"  image_size: {size}  # {_why_size(size, middle)}",
            *([f"  options: {_flow(options)}"] if options else []),
            "augment:",
            *_augment(size),
            "train:",
            f"  epochs: {scale.epochs}  # the fewer the images, the more epochs they bear, and need",
            f"  learning_rate: {scale.learning_rate:g}",
            f"  ramp_epochs: {max(2, scale.epochs // 20)}",
            "method:",
            "  # A model of this size saves no time by its switch: `enabled: false` trains it in full (docs/choosing.md).",
            "  # The paper's relaxed test. `prelora replay` tells where others would have switched, without training.",
            "  tau: 1.0",
            f"  zeta: {scale.zeta:g}" + ("  # the paper has 5: of few images the loss is noisy" if scale.zeta > 5 else ""),
            "  warmup_epochs: 5",
            f"  r_min: {scale.ranks[0]}",
            f"  r_max: {scale.ranks[1]}",
            "",
        ]
    )


def measure(encoded: list[bytes], size: int, crop_ratio: float) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in 0..1, over all pixels of images as evaluation takes them."""
    augmenter = Augmenter(Augmentation(size, (0.5,) * 3, (0.5,) * 3), seed=0, crop_ratio=crop_ratio)
    sums, squares = np.zeros(3), np.zeros(3)
    for content in encoded:
        pixels = augmenter.evaluate(content).reshape(-1, 3) / 255
        sums += pixels.mean(0)
        squares += (pixels**2).mean(0)
    mean = sums / len(encoded)
    std = np.sqrt(np.maximum(squares / len(encoded) - mean**2, 1e-6))  # of images of one colour alone, not zero
    return [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in std.tolist()]


def _range(scale: _Scale) -> str:
    """The numbers of images that a scale is for."""
    lower = max((other.below for other in _SCALES if other.below < scale.below), default=0)
    if scale.below == math.inf:
        return f"{lower:,.0f} and more"
    return f"fewer than {scale.below:,.0f}" if not lower else f"{lower:,.0f} to {scale.below:,.0f}"


def _why_size(size: int, middle: int) -> str:
    if size == _LARGEST:
        return "as usual for photographs"
    return "that of the images" if size == middle else "in whole patches, about that of the images"


def _crop_ratio(crop_ratio: float) -> Iterator[str]:
    if crop_ratio == 1:
        yield f"  crop_ratio: {crop_ratio}  # small images are evaluated whole"


def _augment(size: int) -> Iterator[str]:
    if size <= 64:
        yield "  crop: padded  # small images are shifted, not cut"
        yield f"  padding: {max(1, size // 8)}"
    if size >= 32:
        yield "  policy: rand-m9-mstd0.5-inc1"
    yield "  # flip: 0  # where left is not right, as in digits and letters"
    yield "  mixup: 0.8"
    yield "  cutmix: 1.0"
    yield "  mix_probability: 0.5"
    yield "  label_smoothing: 0.1"


def _flow(options: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}"
