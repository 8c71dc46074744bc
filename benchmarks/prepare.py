"""Images a second and core of `prelora prepare` against a plain process pool that does the same work.

    python benchmarks/prepare.py [IMAGES]

The images are crops of scikit-learn's two photographs at about ImageNet's sizes (500 x 375, JPEG). Both sides decode
them, reduce them to a shorter side of 256 pixels, encode and write. Means of two alternating rounds, after a first one
in which the processes start.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from sklearn.datasets import load_sample_images

from prelora_ray.data.encode import encode
from prelora_ray.data.prepare import prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.ray_session import ray_session


def make_images(folder: Path, count: int) -> list[str]:
    """`count` JPEG crops in two class folders."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    names = []
    for i in range(count):
        photograph = photographs[i % 2]
        top, left = rng.integers(photograph.shape[0] - 375), rng.integers(photograph.shape[1] - 500)
        path = folder / f"class{i % 2}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=90)
        names.append(str(path))
    return names


def encode_file(path: str) -> int:
    settings = PrepareSettings()
    content = encode(Path(path).read_bytes(), settings.size, settings.quality, settings.max_pixels)
    Image.open(io.BytesIO(content))
    Path(path + ".out").write_bytes(content)
    os.unlink(path + ".out")
    return len(content)


def main(count: int) -> None:
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as root, ray_session(), multiprocessing.Pool(cores) as pool:
        names = make_images(Path(root, "images"), count)
        settings = PrepareSettings()
        speeds: dict[str, list[float]] = {"prepare": [], "pool": []}
        for i in range(3):  # the first round warms up
            start = time.perf_counter()
            prepare(str(Path(root, "images")), str(Path(root, f"out{i}")), settings)
            middle = time.perf_counter()
            pool.map(encode_file, names, chunksize=16)
            end = time.perf_counter()
            if i:
                speeds["prepare"].append(count / (middle - start) / cores)
                speeds["pool"].append(count / (end - middle) / cores)
    result = {name: statistics.mean(values) for name, values in speeds.items()}
    result["ratio"] = result["prepare"] / result["pool"]
    print(json.dumps({"images": count, "cores": cores, "ray": ray.__version__, **result}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8192)
