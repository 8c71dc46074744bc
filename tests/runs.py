"""A whole run that takes seconds, and how two of them are compared."""

from __future__ import annotations

import contextlib
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.engine.snapshot import Snapshot, checkpoint_name
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.run_folder import RunFolder

TINY_VIT = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2}
SWITCH, FREEZE, EPOCHS = 3, 5, 7


def settings(digits: Path, storage: Path, name: str, workers: int, /, **sections: dict[str, Any]) -> Settings:
    """A run that its test switches after epoch 3 and that freezes after epoch 5 of 7, all that is drawn turned on.

    Its images grow after epoch 1, in phase full, and after epoch 6, in phase lora.
    """
    content: dict[str, dict[str, Any]] = {
        "data": {"path": str(digits), "batch_size": 96, "cell": 12, "crop_ratio": 1.0, "decoders": 1},
        "model": {
            "name": "vit_tiny_patch16_224",
            "image_size": 8,
            "options": TINY_VIT,
            "drop_path": 0.2,
            "drop_path_form": "subset",
        },
        "augment": {"crop": "padded", "padding": 1, "mixup": 0.8, "cutmix": 1.0},
        "train": {
            "epochs": EPOCHS,
            "ramp_epochs": 1,
            "seed": 5,
            "ema": 0.9,
            "resolution": [{"until": 1, "image_size": 4}, {"until": 0.86, "image_size": 6, "policy": "rand-m3-n1"}],
        },
        "method": {
            "tau": 1000,
            "zeta": 1000,
            "windows": 3,
            "window_epochs": 1,
            "warmup_epochs": 2,
            "r_min": 2,
            "r_max": 8,
            "adapter_ramp_steps": 10,
            "adapter_learning_rate_scale": 1.5,
        },
        "workers": {"min": workers, "max": workers, "cpus": 0.5},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    return parse_settings({"name": name, "storage": str(storage), "audit_samples": True, **content})


class Reports(ray.train.UserCallback):
    """Writes what all workers report to Ray Train beside a run folder, a line each time."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = Path(folder.path).with_suffix(".reports")

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with open(self.path, "a") as file:
            print(json.dumps(metrics), file=file)


def final(run: Settings) -> Snapshot:
    return last(RunFolder.of(run))


def last(folder: RunFolder) -> Snapshot:
    checkpoints = Checkpoints(folder)
    return checkpoints.load(checkpoints.names()[-1])


def assert_same_bits(one: Snapshot, other: Snapshot) -> None:
    assert one.state == other.state
    for part in ("model", "base", "adapter", "ema"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), part
    assert one.optimizer.keys() == other.optimizer.keys()
    for name, entry in one.optimizer.items():
        assert all(torch.equal(value, other.optimizer[name][key]) for key, value in entry.items()), name


def at_mlflow(run: Settings) -> list[Any]:
    """What MLflow has under the run's name; nothing where it is not installed."""
    if find_spec("mlflow") is None:
        return []
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("prelora").experiment_id
    return list(client.search_runs([experiment], f"attributes.run_name = '{run.name}'"))


def wait_inside(folder: RunFolder, epoch: int) -> None:
    """Returns once a checkpoint inside an epoch (from 0) is committed."""
    checkpoints = Checkpoints(folder)
    while not any(name >= checkpoint_name(epoch, 1) for name in checkpoints.names()):
        time.sleep(0.01)


def children(pid: int, title: str) -> list[psutil.Process]:
    """Processes below process `pid` whose title holds `title`; none where it has ended."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
                if title in " ".join(process.cmdline()[:1]):
                    found.append(process)
    return found
