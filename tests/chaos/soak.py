"""A run that is disturbed for a long time, and what its processes hold meanwhile:

    python -m tests.chaos.soak OUT.jsonl [--minutes 30] [--every 60] [--seed 0]

A worker is killed every so many seconds, each fourth time Ray Train's controller instead. OUT, a new file, gets a line
of JSON every few seconds: memory in bytes, threads and open files of each part of the run, and what the run folder and
Ray's own folder hold. `python docs/draw_soak.py` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from prelora_ray.bench.parts import Sample
from prelora_ray.bench.processes import usages
from prelora_ray.data.prepare import prepare
from prelora_ray.ray_session import ray_session
from prelora_ray.records import Progress
from prelora_ray.run_folder import RunFolder
from tests.chaos.faults import FAULTS, Target
from tests.chaos.site import Site, run_folder, wait_for, write_config

SECONDS = 5.0
"""Between two lines."""
LIMIT = 120.0
"""Seconds in which a further attempt trains behind a fault."""
KINDS = ("worker killed", "worker killed", "worker killed", "controller killed")
EPOCHS = (30, 5, 100_000)
"""Of phases full, warmup and lora: more than there is time for."""
RECORDS = ("epochs.jsonl", "norms.jsonl", "windows.jsonl", "events.jsonl", "tensorboard")
"""What tells of each epoch, and so grows with them."""


def main(out: Path, minutes: float, every: float, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        with ray_session():
            prepare("digits", f"{folder}/digits")
        site = Site(Path(folder))
        try:
            disturb(site, _config(Path(folder)), out, minutes, every, random.Random(seed))
        finally:
            site.close()


def _config(folder: Path) -> Path:
    path = write_config(folder, "soak", folder / "digits", EPOCHS)
    content = yaml.safe_load(path.read_text()) | {"audit_samples": False}
    content["checkpoint"] = {"every_epochs": 1000, "every_seconds": 5.0}
    path.write_text(yaml.safe_dump(content))
    return path


def disturb(site: Site, config: Path, out: Path, minutes: float, every: float, rng: random.Random) -> None:
    """Lets a run go on for so many minutes, whatever happens to it. Raises AssertionError where it does not."""
    folder, driver = run_folder(config), site.start_driver(config)
    target = Target(site, config, folder, rng, {})
    wait_for(lambda: _progress(folder), 120, "the first step")
    begin = last = time.monotonic()
    faults, attempt = 0, -1
    with out.open("x") as file:
        while (now := time.monotonic() - begin) < 60 * minutes:
            assert driver.poll() is None, f"the driver has ended: {(site.folder / 'driver.log').read_text()[-2000:]}"
            progress = _progress(folder)
            if time.monotonic() - last > every and progress is not None and progress.attempt > attempt:
                FAULTS[KINDS[faults % len(KINDS)]](target)
                faults, attempt, last = faults + 1, progress.attempt, time.monotonic()
            assert time.monotonic() - last < every + LIMIT, f"no attempt behind attempt {attempt} trains for {LIMIT} s"
            line = {
                "seconds": now,
                "faults": faults,
                "epoch": progress and progress.epoch,
                "attempt": progress and progress.attempt,
            }
            print(json.dumps({**line, **_held(driver.pid), **_sizes(folder)}), file=file, flush=True)
            time.sleep(SECONDS)


def _progress(folder: RunFolder) -> Progress | None:
    """Where the run trains; None while it starts."""
    place = folder.read_place()
    return place if isinstance(place, Progress) else None


def _held(driver: int) -> dict[str, dict[str, dict[str, int]]]:
    """Processes, memory, threads and open files, by part of the run."""
    sample = Sample(0.0, driver, 0, usages(os.getpid()))
    parts: dict[str, dict[str, int]] = {}
    for pid, usage in sample.processes.items():
        if pid == os.getpid():
            continue
        try:
            threads = psutil.Process(pid).num_threads()
        except psutil.NoSuchProcess:
            continue
        held = parts.setdefault(sample.part(pid), {"processes": 0, "memory": 0, "threads": 0, "files": 0})
        for key, value in (("processes", 1), ("memory", usage.memory), ("threads", threads), ("files", usage.files)):
            held[key] += value
    return {"parts": parts}


def _sizes(folder: RunFolder) -> dict[str, Any]:
    """Bytes and files of the run folder, its records apart, and of Ray's folder."""
    root, ray = Path(folder.path), Path(os.environ["RAY_TMPDIR"])
    records = [path for name in RECORDS for path in _files(root / name)]
    return {
        "folder_bytes": _bytes(_files(root)) - _bytes(records),
        "folder_files": len(_files(root)) - len(records),
        "records_bytes": _bytes(records),
        "ray_bytes": _bytes(_files(ray)),
    }


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [Path(parent, name) for parent, _, names in os.walk(path) for name in names]


def _bytes(files: list[Path]) -> int:
    total = 0
    for path in files:
        try:
            total += path.lstat().st_size
        except FileNotFoundError:  # replaced meanwhile
            continue
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
