"""Runs under faults of every kind, each compared with an undisturbed one: `make chaos`, or

    python -m tests.chaos.chaos [--faults N] [--seed N] [--out FILE]

One is on a disk: N faults (default 45), equally many of each kind, at random moments spread over all three phases, and
a full disk at the switch and at the end. One is in a bucket: outages, the longest of ten minutes. It ends with a
table of what each cost, and checks that no sample was lost or counted twice, that the switch and the ranks are those of
the undisturbed run, and that the weights agree.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from prelora_ray.data.prepare import prepare
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import train
from tests.chaos.faults import (
    ANYTIME,
    AT_END,
    AT_SWITCH,
    COSTS_SAVES,
    DRAIN_SECONDS,
    FAULTS,
    IN_BUCKET,
    KILLED_IN_OUTAGE,
    RESTARTS,
    SLOW_BYTES_PER_SECOND,
    TAKES_A_NODE,
    Target,
)
from tests.chaos.site import WORKERS, Site, read_config, run_folder, wait_for, write_config
from tests.conftest import samples
from tests.proxy import Proxy, s3_server

BATCHES = 15
"""Global batches of an epoch."""
STEPS_PER_SECOND = 15
"""Of a run during an outage, at the most."""
STEPS_BETWEEN = 6
"""Fewest steps from one fault's end to the next fault."""
STEPS = {
    "node added": 100,
    "disk full": 40,
    AT_SWITCH: 150,
    **dict.fromkeys(IN_BUCKET, 60 * STEPS_PER_SECOND),
    "bucket out for ten minutes": 600 * STEPS_PER_SECOND,
    KILLED_IN_OUTAGE: 14,
}
"""Steps set aside for a fault during which the run trains on."""
STEPS_OTHER = 14
STEPS_LAST = {"disk": 150, "bucket": 1500}
"""Steps after the last fault: a fast machine does more than were set aside, and tells a bucket of them every 15 s."""
STEPS_BEFORE = 40
"""Steps before a moment at which the disk fills up for it."""
STEPS_BEYOND = 120
"""Most steps by which a fault ends after the steps set aside for it."""
RECOVERY_SECONDS = 150.0
REACH_SECONDS = 3600.0
"""For the steps between two faults, and to the end, on however slow a machine."""


@dataclass(frozen=True)
class Cost:
    kind: str
    phase: str
    seconds: float
    """From the fault to the next trained step of a new attempt; 0 where training went on."""
    steps_again: int


@dataclass(frozen=True)
class Found:
    """How the disturbed run compares with the undisturbed one."""

    batches: int
    """Global batches that were compared."""
    lost: int
    twice: int
    """Samples that no batch, or more than one, counted."""
    difference: float
    """Largest relative difference of a tensor's weights."""
    differ: list[str]
    """Keys of result.json that are not the same."""
    sizes: set[int]
    """Numbers of workers that the runs had."""


def plan(count: int, rng: random.Random) -> list[str]:
    """Faults in random order, equally many of each kind, but for a remainder.

    A node is added after one was taken: else the run would have no use for it.
    """
    each, rest = divmod(count, len(ANYTIME))
    paired = TAKES_A_NODE | {"node added"}
    taking = [kind for kind in sorted(TAKES_A_NODE) for _ in range(each)]
    rng.shuffle(taking)
    groups = [[kind, "node added"] for kind in taking[:each]] + [[kind] for kind in taking[each:]]
    others = [kind for kind in ANYTIME if kind not in paired]
    groups += [[kind] for kind in others * each + rng.choices(others, k=rest)]
    rng.shuffle(groups)
    return [kind for group in groups for kind in group]


def bucket_plan() -> list[str]:
    """The ten minutes lie in the middle: on a fast machine they reach from phase full into lora."""
    before = ["bucket out for a minute", "worker killed", "bucket slow for a minute", KILLED_IN_OUTAGE]
    after = ["driver killed", "bucket silent for a minute", KILLED_IN_OUTAGE]
    return [*before, "bucket out for ten minutes", *after]


def _steps(kind: str) -> int:
    return STEPS.get(kind, STEPS_OTHER)


def epochs_for(faults: list[str], place: Literal["disk", "bucket"] = "disk") -> tuple[int, int, int]:
    """Epochs of full, warmup and lora that hold the faults."""
    per_phase = -(-(STEPS_BETWEEN + sum(map(_steps, faults))) // (3 * BATCHES))
    return max(3, per_phase), per_phase, per_phase + STEPS_LAST[place] // BATCHES


def position(folder: RunFolder) -> dict[str, Any]:
    """Where the run is; a position before the start where progress.json is not there yet, or not whole."""
    try:
        content: dict[str, Any] = folder.read_json("progress.json")
        return content
    except (OSError, ValueError):
        return {"step": -1, "attempt": -1, "phase": "full", "time": 0.0}


def disturb(target: Target, faults: list[str], tell: Callable[[str], None]) -> list[Cost]:
    """Inflicts the faults on a run, each once it has recovered from the one before, and waits for the run's end."""
    costs: list[Cost] = []
    waiting, due, healed = list(faults), STEPS_BETWEEN, 0
    while waiting:
        kind = _next(waiting, healed, target.moments)
        if kind in TAKES_A_NODE and waiting[:1] != ["node added"]:
            target.site.add_node(wait=True)  # in its place
        step = target.moments.get(kind) or max(due, healed + STEPS_BETWEEN)
        due += _steps(kind)
        before = wait_for(functools.partial(_progress, target, step), REACH_SECONDS, f"step {step}, for {kind!r}")
        if kind not in target.moments:
            time.sleep(target.rng.random())
        start = time.time()
        FAULTS[kind](target)
        now = wait_for(functools.partial(_healed, target, kind, before), RECOVERY_SECONDS, f"recovery from {kind!r}")
        if kind == AT_SWITCH:
            assert start < _events(target.folder, "switch")[-1]["time"] < time.time(), "the disk was not full at the switch"
        again, seconds = 0, 0.0
        if now["attempt"] > before["attempt"]:
            again = _events(target.folder, "restart")[-1]["steps_again"]
            seconds = max(0.0, now["time"] - start)
        costs.append(Cost(kind, before["phase"], seconds, again))
        healed = now["step"]
        place = f"{kind} at step {before['step']} in {before['phase']}"
        tell(f"{len(costs)}/{len(faults)} {place}: {seconds:.1f} s, {again} steps again, now step {healed}")
    assert target.site.driver
    assert target.site.driver.wait(timeout=REACH_SECONDS) == 0, "the run ends by itself"
    return costs


def _next(waiting: list[str], healed: int, moments: dict[str, int]) -> str:
    """Takes the fault that comes next: the one for the switch before any that may reach it."""
    kind = waiting[0]
    if AT_SWITCH in waiting and healed + _steps(kind) + STEPS_BEYOND > moments[AT_SWITCH]:
        kind = AT_SWITCH
    waiting.remove(kind)
    return kind


def _progress(target: Target, step: int) -> dict[str, Any] | None:
    now = position(target.folder)
    assert target.site.driver and target.site.driver.poll() is None, "the run ended before all has happened to it"
    return now if now["step"] >= step else None


def _events(folder: RunFolder, event: str) -> list[dict[str, Any]]:
    return [line for line in folder.read_lines("events.jsonl") if line["event"] == event]


def _healed(target: Target, kind: str, before: dict[str, Any]) -> dict[str, Any] | None:
    now = position(target.folder)
    restarted = now["attempt"] > before["attempt"]
    if kind in RESTARTS:
        return now if restarted else None
    assert not restarted, f"{kind!r} started the group again"
    if kind not in COSTS_SAVES:
        return now if now["step"] > before["step"] else None
    failed = [line for line in _events(target.folder, "checkpoint_failed") if line["time"] > before["time"]]
    return now if failed and now["step"] > before["step"] else None


def compare(disturbed: RunFolder, plain: RunFolder) -> Found:
    ours, theirs = samples(disturbed), samples(plain)
    places = ours.keys() | theirs.keys()
    lost = twice = 0
    for place in places:
        one, other = ours.get(place, []), theirs.get(place, [])
        lost += len(set(other) - set(one))
        twice += len(one) - len(set(one)) + len(set(one) - set(other))
    a, b = (Checkpoints(folder).newest()[0] for folder in (disturbed, plain))
    assert a and b
    difference = 0.0
    for part in ("model", "base", "adapter"):
        tensors, expected = getattr(a, part), getattr(b, part)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            difference = max(difference, float((tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)))
    results = [folder.read_json("result.json") for folder in (disturbed, plain)]
    differ = [key for key in ("epochs", "switch_epoch", "freeze_epoch", "ranks") if results[0][key] != results[1][key]]
    events = [*disturbed.read_lines("events.jsonl"), *plain.read_lines("events.jsonl")]
    sizes = {line["world_size"] for line in events if "world_size" in line}
    return Found(len(places), lost, twice, difference, differ, sizes)


def check(found: Found, costs: list[Cost], folder: RunFolder) -> None:
    assert found.lost == found.twice == 0, found
    assert not found.differ, found
    assert found.difference <= (1e-5 if len(found.sizes) > 1 else 0.0), found
    for kind, event in {
        "node drained": "preemption",
        "driver stopped": "stop",
        "checkpoint damaged": "checkpoint_damaged",
    }.items():
        assert len(_events(folder, event)) >= sum(cost.kind == kind for cost in costs), f"{kind}: {event} is not on record"


def page(disk: tuple[list[Cost], Found], bucket: tuple[list[Cost], Found], seconds: float) -> str:
    """The results as a page."""
    (on_disk, _), (in_bucket, _) = disk, bucket
    (longest,) = (cost for cost in in_bucket if cost.kind == "bucket out for ten minutes")
    kilobytes = SLOW_BYTES_PER_SECOND / 1000
    versions = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, Ray {ray.__version__}"
    return f"""# {len(on_disk) + len(in_bucket)} faults in two runs

    make chaos

A ViT of 3 blocks on scikit-learn's digits in float64, 1 to {WORKERS} workers on nodes of one CPU each, all on one machine of
{os.cpu_count()} CPU cores; {versions}. Seconds are from the fault to the next trained step:
for a drained node from the notice, {DRAIN_SECONDS} s before it goes; for a node that is added, from the start of its processes;
for a disk that is full at the end, from when it fills up. Where they are 0 the run trained on. The undisturbed run
trains beside it on the same cores, as long as it lasts.

## On a disk: {len(on_disk)} faults

{_table(*disk)}

## In a bucket, behind a proxy: {len(in_bucket)} faults

Off, the proxy ends every connection; silent, it answers nothing; slow, it passes on {kilobytes:g} kB/s a connection.
The ten minutes began in phase {longest.phase}.

{_table(*bucket)}

In all {seconds / 60:.0f} minutes.
"""


def _table(costs: list[Cost], found: Found) -> str:
    rows = []
    for kind in FAULTS:
        of_kind = [cost for cost in costs if cost.kind == kind]
        if not of_kind:
            continue
        counts = " | ".join(str(sum(cost.phase == phase for cost in of_kind)) for phase in ("full", "warmup", "lora"))
        middle, most = statistics.median(cost.seconds for cost in of_kind), max(cost.seconds for cost in of_kind)
        again = max(cost.steps_again for cost in of_kind)
        rows.append(f"| {kind} | {counts} | {middle:.1f} | {most:.1f} | {again} |")
    return f"""| fault | in full | in warmup | in lora | median s | most s | steps done again, most |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

| against the undisturbed run | |
| --- | --- |
| global batches compared | {found.batches} |
| samples lost | {found.lost} |
| samples counted twice | {found.twice} |
| switch, freeze, ranks | {"differ: " + ", ".join(found.differ) if found.differ else "the same"} |
| largest relative difference of a tensor of the final weights | {found.difference:.1e} |"""


@contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """A file system of its own, so that filling it up harms nobody; yields whether there is one, which takes root."""
    path.mkdir()
    is_there = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(path)], check=False).returncode == 0
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", "-l", str(path)], check=False)


def run_on_disk(
    directory: Path,
    data: Path,
    faults: list[str],
    rng: random.Random,
    *,
    at_switch_and_end: bool = True,
    plain_workers: int = 1,
) -> tuple[list[Cost], Found]:
    """Raises AssertionError where the run differs from an undisturbed one. Prints as it goes.

    `plain_workers`: of the undisturbed run, where faults change the other's number; one is the least work.
    """
    with small_disk(directory / "runs") as can_be_full:
        if not can_be_full:
            print("no file system of its own for the run folder (that takes root): without full disks")
            faults = [fault for fault in faults if fault != "disk full"]
        epochs, moments = epochs_for(faults), {}
        if can_be_full and at_switch_and_end:
            faults = [*faults, AT_SWITCH, AT_END]
            epochs = epochs_for(faults)
            moments[AT_SWITCH] = epochs[0] * BATCHES - STEPS_BEFORE
            moments[AT_END] = sum(epochs) * BATCHES - STEPS_BEFORE
        return _run(directory, data, faults, epochs, rng, moments, plain_workers=plain_workers)


def run_in_bucket(directory: Path, data: Path, rng: random.Random) -> tuple[list[Cost], Found]:
    """Raises AssertionError where the run differs from an undisturbed one. Prints as it goes."""
    faults = bucket_plan()
    with s3_server() as proxy:
        return _run(directory, data, faults, epochs_for(faults, "bucket"), rng, {}, proxy)


def _run(
    directory: Path,
    data: Path,
    faults: list[str],
    epochs: tuple[int, int, int],
    rng: random.Random,
    moments: dict[str, int],
    proxy: Proxy | None = None,
    plain_workers: int = 1,
) -> tuple[list[Cost], Found]:
    """The undisturbed run and the disturbed one: in `directory`, or in the bucket behind `proxy`."""
    # Where no fault changes the other's number of workers, it is the same, so that every bit must agree.
    workers = WORKERS if TAKES_A_NODE.isdisjoint(faults) else plain_workers
    quiet = directory / "quiet"  # outside the file system that fills up
    quiet.mkdir()
    plain = read_config(write_config(quiet, "plain", data, epochs, workers=workers))
    beside = ThreadPoolExecutor()
    undisturbed = beside.submit(train, plain)  # on another Ray: this process's
    site = Site(directory)
    try:
        config = write_config(directory, "disturbed", data, epochs, storage="s3://bucket/runs" if proxy else None)
        folder = run_folder(config)
        site.start_driver(config)
        target = Target(site, config, folder, rng, moments, proxy)
        costs = disturb(target, faults, functools.partial(print, flush=True))
        finished = folder.epochs()
        assert [line.epoch for line in finished] == list(range(sum(epochs)))
        undisturbed.result(timeout=REACH_SECONDS)
        found = compare(folder, RunFolder.of(plain))
        check(found, costs, folder)
        return costs, found
    except AssertionError:
        print((directory / "driver.log").read_text()[-5000:])
        raise
    finally:
        site.close()
        beside.shutdown(wait=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=45, help="on the disk; at least one of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="file for the results as a page")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        directory = Path(name)
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        data = directory / "digits"
        prepare("digits", str(data))
        (directory / "disk").mkdir()
        on_disk = run_on_disk(directory / "disk", data, plan(options.faults, rng), rng)
        (directory / "bucket").mkdir()
        in_bucket = run_in_bucket(directory / "bucket", data, rng)
    text = page(on_disk, in_bucket, time.monotonic() - start)
    print(text)
    if options.out:
        Path(options.out).write_text(text)


if __name__ == "__main__":
    main()
