"""What goes wrong on a shared cluster, done on purpose. Each fault returns when it is done, not when it is healed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from prelora_ray.run_folder import RunFolder
from prelora_ray.train.checkpoint import Checkpoints
from tests.chaos.site import Site, wait_for

DRAIN_SECONDS = 6
FULL_SECONDS = 3


@dataclass
class Target:
    """What a fault is done to."""

    site: Site
    config: Path
    folder: RunFolder
    rng: random.Random

    def worker(self) -> psutil.Process:
        return self.rng.choice(wait_for(self.site.workers, 30, "a worker"))


def kill_worker(target: Target) -> None:
    target.worker().kill()


def hang_worker(target: Target) -> None:
    target.worker().suspend()


def kill_controller(target: Target) -> None:
    target.site.controller().kill()


def kill_driver(target: Target) -> None:
    target.site.kill_driver()
    target.site.start_driver(target.config)


def stop_driver(target: Target) -> None:
    """SIGTERM: the run saves where it stands, and ends."""
    assert target.site.driver
    target.site.driver.send_signal(signal.SIGTERM)
    assert target.site.driver.wait(timeout=60) == 130
    target.site.start_driver(target.config)


def kill_raylet(target: Target) -> None:
    target.site.take_busy(target.rng).kill_raylet()


def remove_node(target: Target) -> None:
    """SIGTERM to the node, as from `ray stop` or a cloud that takes it."""
    target.site.cluster.remove_node(target.site.take_busy(target.rng), allow_graceful=True)


def add_node(target: Target) -> None:
    target.site.add_node()


def drain_node(target: Target) -> None:
    """A notice with a deadline; then the node goes."""
    node = target.site.take_busy(target.rng)
    deadline = time.monotonic() + DRAIN_SECONDS
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
        *("--address", target.site.cluster.address, "--node-id", node.node_id),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
        *("--deadline-remaining-seconds", str(DRAIN_SECONDS)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    time.sleep(max(0.0, deadline - time.monotonic()))
    target.site.cluster.remove_node(node, allow_graceful=False)


def corrupt_checkpoint(target: Target) -> None:
    """Flips a bit, cuts or removes a file of the newest checkpoint, and has it read."""
    checkpoints = Checkpoints(target.folder)
    workers = wait_for(target.site.workers, 30, "a worker")
    for worker in workers:  # nothing newer is written meanwhile
        worker.suspend()
    newest = Path(checkpoints.folder.path, checkpoints.names()[-1])
    path = newest / target.rng.choice(["model.safetensors", "optimizer.safetensors", "state.json"])
    match target.rng.choice(["flip", "cut", "remove"]):
        case "flip":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "cut":
            path.write_bytes(path.read_bytes()[:-7])
        case "remove":
            path.unlink()
    for worker in workers:
        worker.kill()


def fill_disk(target: Target) -> None:
    """No room for a while on the run folder's own file system, also where the run frees some of it."""
    filler = Path(target.folder.path).parent / "filler"
    end = time.monotonic() + FULL_SECONDS
    with open(filler, "wb", buffering=0) as file:
        while time.monotonic() < end:
            try:
                file.write(bytes(2**16))
            except OSError:
                time.sleep(0.01)
    filler.unlink()


RESTARTING: dict[str, Callable[[Target], None]] = {
    "worker killed": kill_worker,
    "worker hangs": hang_worker,
    "controller killed": kill_controller,
    "driver killed": kill_driver,
    "driver stopped": stop_driver,
    "raylet killed": kill_raylet,
    "node removed": remove_node,
    "node drained": drain_node,
    "node added": add_node,
    "checkpoint damaged": corrupt_checkpoint,
}
"""Faults after which the worker group starts again."""
FAULTS = RESTARTING | {"disk full": fill_disk}
TAKES_A_NODE = {"raylet killed", "node removed", "node drained"}
