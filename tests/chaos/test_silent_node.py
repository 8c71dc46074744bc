"""A machine that vanishes: nothing on it answers any more, and nothing refuses either."""

from __future__ import annotations

import functools
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from prelora_ray.run_folder import RunFolder
from tests.chaos.chaos import position
from tests.chaos.site import Site, run_folder, wait_for, write_config


@pytest.mark.slow
def test_training_goes_on_without_a_node_that_falls_silent(digits: Path, tmp_path: Path) -> None:
    """With the default `hang_seconds`, so that Ray's health checks must find it. Prints seconds to the next step."""
    config = write_config(tmp_path, "silent", digits, (400, 5, 5), hang_seconds=120.0)
    folder = run_folder(config)
    site = Site(tmp_path)
    try:
        site.start_driver(config)
        wait_for(lambda: position(folder)["step"] > 20, 120, "a step on two workers")
        raylet = psutil.Process(site.take_busy(random.Random(0)).all_processes["raylet"][0].process.pid)
        silent = [raylet, *raylet.children(recursive=True)]
        for process in silent:
            process.suspend()
        start = time.time()
        try:
            now = wait_for(functools.partial(_restarted, folder), 120, "a step without the silent node")
        finally:
            for process in silent:
                process.kill()
        print(f"{now['time'] - start:.0f} s from the silence to the next step")
        (restart,) = (line for line in folder.read_lines("events.jsonl") if line["event"] == "restart")
        assert (restart["world_size"], restart["cause"]) == (1, "failure")
    finally:
        site.close()


def _restarted(folder: RunFolder) -> dict[str, Any] | None:
    now = position(folder)
    return now if now["attempt"] > 0 else None
