"""A cluster of several raylets on this machine, and a run on it whose driver is a process of its own."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.cluster_utils import Cluster

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.run_folder import RunFolder
from tests.command import COMMAND, ROOT
from tests.runs import children

WORKERS = 2
"""Most workers that the run takes."""
HANG_SECONDS = 5.0


class Site:
    """A head without room for workers, and nodes with room for one each: as many as the run takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path must be short
        health = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000}  # as in cluster.yaml
        like_a_larger_node = {"num_workers_soft_limit": 3}  # readers stay for the next attempt, as with more CPUs
        system = health | like_a_larger_node
        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "_system_config": system}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self.driver: subprocess.Popen[bytes] | None = None
        self.log = open(folder / "driver.log", "ab")  # noqa: SIM115
        for _ in range(WORKERS):
            self.add_node()

    def close(self) -> None:
        self.kill_driver()
        self.cluster.shutdown()
        self.log.close()

    def add_node(self, *, wait: bool = False) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, wait=wait))

    def take_busy(self, rng: random.Random) -> Any:
        """A node on which a worker of the run is; it is no longer counted as one of the site's."""
        node = rng.choice(wait_for(lambda: [node for node in self.nodes if self._workers_of(node)], 60, "a busy node"))
        self.nodes.remove(node)
        return node

    def start_driver(self, config: Path) -> subprocess.Popen[bytes]:
        self.driver = subprocess.Popen(
            [*COMMAND, "train", str(config)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": self.cluster.address},
            stdout=self.log,
            stderr=self.log,
        )
        return self.driver

    def kill_driver(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
        if self.driver is not None:
            self.driver.wait()

    def workers(self) -> list[psutil.Process]:
        """The run's workers, by process number."""
        return sorted((process for node in self.nodes for process in self._workers_of(node)), key=lambda process: process.pid)

    def controller(self) -> psutil.Process:
        """Ray Train's controller, on whatever node it is."""
        nodes = [self.cluster.head_node, *self.nodes]
        return wait_for(lambda: [p for node in nodes for p in _children(node, "TrainController")], 30, "a controller")[0]

    def _workers_of(self, node: Any) -> list[psutil.Process]:
        return _children(node, "RayTrainWorker")


class OwnRay:
    """The site of a run whose driver is this process, with a Ray of its own."""

    def workers(self) -> list[psutil.Process]:
        """The run's workers, by process number."""
        return sorted(children(os.getpid(), "RayTrainWorker"), key=lambda process: process.pid)

    def controller(self) -> psutil.Process:
        """Ray Train's controller."""
        return wait_for(lambda: children(os.getpid(), "TrainController"), 30, "a controller")[0]


def _children(node: Any, title: str) -> list[psutil.Process]:
    """Processes of a node whose title holds `title`."""
    raylets = node.all_processes.get("raylet")
    return children(raylets[0].process.pid, title) if raylets else []


def write_config(
    folder: Path,
    name: str,
    data: Path,
    epochs: tuple[int, int, int],
    *,
    storage: str | None = None,
    workers: int = WORKERS,
    hang_seconds: float = HANG_SECONDS,
) -> Path:
    """A recipe in float64: so many epochs of each phase, 1 to `workers` workers, every random draw turned on."""
    full, warmup, lora = epochs
    content: dict[str, Any] = {
        "name": name,
        "storage": storage or str(folder / "runs"),
        "audit_samples": True,
        "data": {"path": str(data), "batch_size": 96, "cell": 12, "crop_ratio": 1.0, "decoders": 1},
        "model": {
            "name": "vit_tiny_patch16_224",
            "image_size": 8,
            "drop_path": 0.2,
            "options": {"patch_size": 2, "embed_dim": 48, "depth": 3, "num_heads": 3},
        },
        "augment": {"crop": "padded", "padding": 1, "mixup": 0.8, "cutmix": 1.0},
        "train": {"epochs": full + warmup + lora, "ramp_epochs": 1, "seed": 5, "precision": "fp64"},
        "method": {
            "tau": 1000,
            "zeta": 1000,
            "windows": full,
            "window_epochs": 1,
            "warmup_epochs": warmup,
            "r_min": 2,
            "r_max": 8,
        },
        "workers": {"min": 1, "max": workers, "cpus": 1.0, "max_failures": -1, "hang_seconds": hang_seconds},
        "checkpoint": {"every_steps": 5, "every_seconds": 2.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def read_config(config: Path) -> Settings:
    return parse_settings(yaml.safe_load(config.read_text()))


def run_folder(config: Path) -> RunFolder:
    return RunFolder.of(read_config(config))


def wait_for(condition: Any, seconds: float, what: str) -> Any:
    """What `condition` returns once it is true. Raises AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen in {seconds:g} s")
