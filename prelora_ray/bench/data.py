"""Decoded and augmented images a second: our stream, the same decoder in a bare process pool, and torch's DataLoader.

All of them turn the same JPEG files, crops of two photographs at ImageNet's usual sizes, into flipped random resized
crops, with as many decoding processes as there are cores.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prelora_ray.bench.images import write_images
from prelora_ray.bench.machine import describe
from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.augment import Augmenter
from prelora_ray.data.batch import Pass
from prelora_ray.data.image_rows import ImageRows
from prelora_ray.data.manifest import Manifest, read_manifest
from prelora_ray.data.prepare import prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.rows import read_encoded
from prelora_ray.data.stream import stream_batches
from prelora_ray.errors import UserError
from prelora_ray.ray_session import ray_session
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan

_STORED = 512
"""Larger than any of the images, so that `prepare` leaves their bytes alone."""


@dataclass(frozen=True)
class Options:
    images: int = 2000
    image_size: int = 224
    batch: int = 64
    cores: int = os.cpu_count() or 1
    passes: int = 3
    """Over the images. The first one, in which processes start, is not counted."""


def bench_data(options: Options) -> dict[str, Any]:
    """Measures every way over the same files; `rows` and what they ran on, as JSON can hold it.

    Raises UserError where a pass has fewer than four batches, too few for a rate.
    """
    if 4 * options.batch > options.images:
        raise UserError(f"--batch {options.batch} is not allowed with --images {options.images}: a pass needs four batches")
    with tempfile.TemporaryDirectory() as directory:
        source, small, whole = (str(Path(directory, name)) for name in ("source", "small", "whole"))
        write_images(Path(source), options.images)
        with ray_session():
            prepare(source, whole, PrepareSettings(size=_STORED))
            prepare(source, small, PrepareSettings())
            rates = {
                "prelora stream": _stream_rate(whole, options),
                "prelora stream, images prepared at 256": _stream_rate(small, options),
            }
        rates["our decoder in a bare process pool"] = _pool_rate(whole, options)
        rates["torch DataLoader, torchvision on Pillow"] = _loader_rate(source, options)
    base = rates["torch DataLoader, torchvision on Pillow"]
    rows = [
        {"name": name, "images_per_second_and_core": rate / options.cores, "against_the_data_loader": rate / base}
        for name, rate in rates.items()
    ]
    return {"benchmark": "data", **describe(torch.device("cpu")), "options": vars(options), "rows": rows}


def _settings(path: str, options: Options) -> Settings:
    data = {"path": path, "batch_size": options.batch, "cell": 4}
    return parse_settings({"name": "bench", "data": data, "model": {"image_size": options.image_size}})


def _rate(batches: Iterator[int], options: Options) -> float:
    """Images a second of an iterator over numbers of images, after the first pass."""
    seen, begin, before = 0, 0.0, 0
    for images in batches:
        seen += images
        if not begin and seen >= options.images:
            begin, before = time.perf_counter(), seen
    return (seen - before) / (time.perf_counter() - begin)


def _stream_rate(path: str, options: Options) -> float:
    settings = _settings(path, options)
    manifest = read_manifest(Storage(path))
    plan = stream_plan(settings, manifest, rank=0, world_size=1)
    passes = [Pass("train", epoch) for epoch in range(options.passes)]
    batches = stream_batches(plan, passes, options.cores)
    return _rate((batch.count for batch in batches), options)


def _pool_rate(path: str, options: Options) -> float:
    settings, manifest = _settings(path, options), read_manifest(Storage(path))
    encoded = read_encoded(path, manifest.splits["train"], options.images)
    tasks = [(i % len(encoded), encoded[i % len(encoded)]) for i in range(options.images * options.passes)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.cores, _start_pool, (settings, manifest)) as pool:
        return _rate(iter(pool.imap_unordered(_augment, tasks, chunksize=16)), options)


_augment_one: Callable[[bytes, int, int], Any]


def _start_pool(settings: Settings, manifest: Manifest) -> None:
    global _augment_one
    rows = stream_plan(settings, manifest, rank=0, world_size=1).rows
    assert isinstance(rows, ImageRows)
    _augment_one = Augmenter(rows.augmentation, rows.seed, rows.crop_ratio).train


def _augment(task: tuple[int, bytes]) -> int:
    sample, encoded = task
    _augment_one(encoded, 0, sample)
    return 1


def _loader_rate(source: str, options: Options) -> float:
    """What timm's and torchvision's own training scripts do."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    crop = RandomResizedCrop(options.image_size, interpolation=InterpolationMode.BICUBIC)
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    dataset = ImageFolder(f"{source}/train", Compose([crop, RandomHorizontalFlip(), ToTensor(), normalize]))
    loader = torch.utils.data.DataLoader(
        dataset, options.batch, shuffle=True, num_workers=options.cores, persistent_workers=True, multiprocessing_context="fork"
    )
    batches = (len(labels) for _ in range(options.passes) for _, labels in loader)
    return _rate(batches, options)
