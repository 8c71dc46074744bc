"""Images a second and core of `prelora prepare`, against a plain process pool that does the same work."""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from prelora_ray.bench.images import write_images
from prelora_ray.bench.machine import describe
from prelora_ray.data.encode import encode
from prelora_ray.data.prepare import prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.ray_session import ray_session


def _encode_file(path: str) -> int:
    settings = PrepareSettings()
    content = encode(Path(path).read_bytes(), settings.size, settings.quality, settings.max_pixels)
    Image.open(io.BytesIO(content))
    Path(path + ".out").write_bytes(content)
    os.unlink(path + ".out")
    return len(content)


def bench_prepare(count: int) -> dict[str, Any]:
    """Has both decode, reduce, encode and write the same images, in alternating rounds after one to start processes."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as root, ray_session(), multiprocessing.Pool(cores) as pool:
        write_images(Path(root, "images"), count)
        names = [str(path) for path in Path(root, "images").rglob("*.jpg")]
        settings = PrepareSettings()
        speeds: dict[str, list[float]] = {"prepare": [], "pool": []}
        for i in range(3):  # the first round warms up
            start = time.perf_counter()
            prepare(str(Path(root, "images")), str(Path(root, f"out{i}")), settings)
            middle = time.perf_counter()
            pool.map(_encode_file, names, chunksize=16)
            end = time.perf_counter()
            if i:
                speeds["prepare"].append(len(names) / (middle - start) / cores)
                speeds["pool"].append(len(names) / (end - middle) / cores)
    rates = {name: statistics.mean(values) for name, values in speeds.items()}
    rows = [
        {"name": name, "images_per_second_and_core": rate, "against_the_pool": rate / rates["pool"]}
        for name, rate in rates.items()
    ]
    return {"benchmark": "prepare", **describe(torch.device("cpu")), "options": {"images": count}, "rows": rows}
