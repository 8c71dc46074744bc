"""What goes wrong on a shared cluster, done on purpose. Each fault returns when it is done, not when it is healed."""

from __future__ import annotations

import functools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.run_folder import RunFolder
from tests.chaos.site import OwnRay, Site, wait_for
from tests.disk import Disk
from tests.proxy import Proxy, State

DRAIN_SECONDS = 6
FULL_SECONDS = 3
OUTAGE_SECONDS = 20
"""Less than an attempt's start waits."""
SWITCH_SECONDS = 10
"""How long the disk is full around the switch."""
SLOW_BYTES_PER_SECOND = 2e4
"""A checkpoint takes longer than a worker may hang."""


@dataclass
class Target:
    """What a fault is done to."""

    site: Site | OwnRay
    config: Path
    folder: RunFolder
    rng: random.Random
    moments: dict[str, int]
    """Steps at which faults happen that belong to a moment of the run."""
    proxy: Proxy | None = None
    """The way to the bucket that holds the run folder; None where it is on a disk."""

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
    give_notice(target.site.cluster.address, node.node_id, DRAIN_SECONDS)
    time.sleep(max(0.0, deadline - time.monotonic()))
    target.site.cluster.remove_node(node, allow_graceful=False)


def give_notice(cluster: str, node_id: str, seconds: int) -> None:
    """Tells a cluster, by its address, that a node is about to go, as a cloud does of one that it takes back."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster, "--node-id", node_id),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
        *("--deadline-remaining-seconds", str(seconds)),
    ]
    subprocess.run(command, check=True, capture_output=True)


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


def start_two_drivers(target: Target) -> None:
    """At once, in place of one that was killed: one of them gets in."""
    target.site.kill_driver()
    drivers = [target.site.start_driver(target.config) for _ in range(2)]
    refused = wait_for(lambda: [driver for driver in drivers if driver.poll() is not None], 60, "a driver that is refused")
    assert [driver.returncode for driver in refused] == [2]
    target.site.driver = next(driver for driver in drivers if driver not in refused)


def fill_disk(target: Target, seconds: float = FULL_SECONDS) -> None:
    """No room for a while on the run folder's own file system, also where the run frees some of it."""
    disk = Disk(Path(target.folder.path).parent)
    disk.fill()
    time.sleep(seconds)
    disk.free()


def fill_disk_at_the_end(target: Target) -> None:
    """Until the run ends without its last checkpoint; then it is started again."""
    assert target.site.driver
    disk = Disk(Path(target.folder.path).parent)
    disk.fill()
    assert target.site.driver.wait(timeout=120) == 1
    disk.free()
    target.site.start_driver(target.config)


def cut_off_bucket(target: Target, seconds: float, state: State = "off") -> None:
    assert target.proxy
    with target.proxy.outage(state):
        time.sleep(seconds)


def kill_worker_in_outage(target: Target) -> None:
    """The next attempt begins before the bucket is back, and waits for it."""
    assert target.proxy
    with target.proxy.outage():
        kill_worker(target)
        time.sleep(OUTAGE_SECONDS)


def slow_down_bucket(target: Target, seconds: float) -> None:
    assert target.proxy
    target.proxy.bytes_per_second = SLOW_BYTES_PER_SECOND
    time.sleep(seconds)
    target.proxy.bytes_per_second = None


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
    "two drivers at once": start_two_drivers,
}
ANYTIME = RESTARTING | {"disk full": fill_disk}
"""What happens at random moments to a run on a disk."""
KILLED_IN_OUTAGE = "worker killed, bucket out"
AT_SWITCH, AT_END = "disk full at the switch", "disk full at the end"
IN_BUCKET: dict[str, Callable[[Target], None]] = {
    "bucket out for a minute": functools.partial(cut_off_bucket, seconds=60),
    "bucket silent for a minute": functools.partial(cut_off_bucket, seconds=60, state="silent"),
    "bucket slow for a minute": functools.partial(slow_down_bucket, seconds=60),
    "bucket out for ten minutes": functools.partial(cut_off_bucket, seconds=600),
    KILLED_IN_OUTAGE: kill_worker_in_outage,
}
FAULTS = ANYTIME | {AT_SWITCH: functools.partial(fill_disk, seconds=SWITCH_SECONDS), AT_END: fill_disk_at_the_end} | IN_BUCKET
TAKES_A_NODE = {"raylet killed", "node removed", "node drained"}
RESTARTS = {*RESTARTING, AT_END, KILLED_IN_OUTAGE}
"""The worker group starts again."""
COSTS_SAVES = {name for name in FAULTS if name.startswith("disk full") or name.startswith("bucket out")} - {AT_END}
"""The run trains on, and saves fail."""
