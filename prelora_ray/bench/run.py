"""What a run costs beside its steps: Ray around the loop, and the way from the command to the first step."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from prelora_ray.bench.images import write_images
from prelora_ray.bench.machine import describe, seconds_per_call
from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Pass
from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.prepare import prepare
from prelora_ray.data.stream import stream_batches
from prelora_ray.engine.check import check_model
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.errors import WorkError
from prelora_ray.ray_session import ray_session
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan
from prelora_ray.train.run import train

_LOOP_BATCHES = 12
"""In an epoch of `bench loop`."""


@dataclass(frozen=True)
class Options:
    model: str = "vit_tiny_patch16_224"
    image_size: int = 64
    batch: int = 128
    epochs: int = 6


def bench_loop(options: Options) -> dict[str, Any]:
    """Our loop under Ray Train, on JPEG files that Ray Data decodes, against the same steps on batches in memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        settings = _settings(directory, options)
        with ray_session():
            write_images(Path(directory, "images"), _LOOP_BATCHES * options.batch)
            prepare(f"{directory}/images", settings.data.path)
            train(settings)
            epochs = RunFolder.of(settings).epochs()[1:]  # the first one compiles
            under_ray = statistics.median(line.images_per_second for line in epochs)
            waits = statistics.median(line.data_wait_seconds / line.train_seconds for line in epochs)
            bare = _bare_rate(settings, device)
    rows = [
        {"name": "bare loop", "images_per_second": bare, "against_the_bare_loop": 1.0, "waits_for_data": 0.0},
        {
            "name": "under Ray Train and Ray Data",
            "images_per_second": under_ray,
            "against_the_bare_loop": under_ray / bare,
            "waits_for_data": waits,
        },
    ]
    return {"benchmark": "loop", **describe(device), "options": vars(options), "rows": rows}


def _bare_rate(settings: Settings, device: torch.device) -> float:
    torch.set_num_threads(max(1, int(settings.workers.cpus)))  # as Ray does for a worker
    manifest = read_manifest(Storage(settings.data.path))
    plan = stream_plan(settings, manifest, rank=0, world_size=1)
    kept = list(stream_batches(plan, [Pass("train", 0)], decoders=1))
    state = TrainState(settings, len(manifest.classes), plan.orders["train"].num_batches, device, world_size=1)
    train_step, batches = TrainStep(state, plan), itertools.cycle(kept)
    for _ in range(6):
        train_step.train(next(batches))
    seconds = len(kept) * seconds_per_call(lambda: train_step.train(next(batches)), device, calls=len(kept))
    return manifest.num_images("train") / seconds


def bench_restart(options: Options) -> dict[str, Any]:
    """Seconds from the command to the first trained step, with an empty compile cache and with a filled one.

    Raises UserError for a model that cannot work, WorkError where a run ends without a step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        settings = _settings(directory, options)
        check_model(settings)
        with ray_session():
            prepare("digits", settings.data.path)
        for name in ("empty compile cache", "filled compile cache"):
            own = settings.model_copy(update={"name": name.split()[0]})
            rows.append({"name": name, "seconds_to_the_first_step": _seconds_to_first_step(own, f"{directory}/cache")})
    return {"benchmark": "restart", **describe(device), "options": vars(options), "rows": rows}


def _seconds_to_first_step(settings: Settings, cache: str) -> float:
    folder = RunFolder.of(settings)
    recipe = Path(f"{folder}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
    start = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "prelora_ray", "train", str(recipe)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not folder.exists("progress.json"):
            if process.poll() is not None:
                raise WorkError(f"the run ended with status {process.returncode} and without a step")
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait()
    return folder.read_progress().time - start


def _settings(directory: str, options: Options) -> Settings:
    return parse_settings(
        {
            "name": "bench",
            "storage": f"{directory}/runs",
            "data": {"path": f"{directory}/data", "batch_size": options.batch, "cell": 8},
            "model": {"name": options.model, "image_size": options.image_size},
            "train": {"epochs": options.epochs, "ramp_epochs": 1, "validate_every": options.epochs},
            "method": {"enabled": False},
            "monitor": {"enabled": False},
        }
    )
