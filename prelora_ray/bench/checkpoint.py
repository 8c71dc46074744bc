"""What a checkpoint costs the loop that it is written beside."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch

from prelora_ray.bench.machine import describe, synchronize
from prelora_ray.config_file import parse_settings
from prelora_ray.engine.check import check_model
from prelora_ray.engine.state import TrainState
from prelora_ray.errors import WorkError
from prelora_ray.fault_tolerance.async_checkpointer import AsyncCheckpointer
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, Retention
from prelora_ray.storage import Storage
from prelora_ray.words import counted

_ROUNDS = 5


def bench_checkpoint(model: str, image_size: int, batch: int) -> dict[str, Any]:
    """Takes snapshots in the midst of steps, and goes on stepping until each is written, checksummed and committed.

    Rows are what that costs, in the median and at most of five rounds; `step_ms` is a step beside no save. Raises
    UserError for a model that cannot work, WorkError where it does not fit on the GPU, or a checkpoint not on the disk.
    """
    try:
        return _bench(model, image_size, batch)
    except torch.OutOfMemoryError:
        raise WorkError(
            f"the GPU has no room for {counted(batch, 'image')} of {model} beside a checkpoint's snapshot: take "
            "fewer, with --batch"
        ) from None


def _bench(model: str, image_size: int, batch: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = parse_settings(
        {
            "name": "bench",
            "data": {"path": "none"},
            "model": {"name": model, "image_size": image_size},
            "train": {"compile": False},
        }
    )
    check_model(settings)
    state = TrainState(settings, 1000, 10**6, device, 1)
    images = torch.randn(batch, 3, image_size, image_size, device=device)

    def step() -> float:
        start = time.perf_counter()
        with state.autocast():
            loss = state.network(images).float().logsumexp(-1).mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start

    for _ in range(3):
        step()
    usual = statistics.median(step() for _ in range(10))
    blocked, longest, slowed, written = [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Storage(directory))
        checkpointer = AsyncCheckpointer(checkpoints, Retention(keep=1))
        for round_ in range(_ROUNDS):
            state.epoch = round_
            start = time.perf_counter()
            checkpointer.start(lambda: state.snapshot([], holds_base=False))
            synchronize(device)
            blocked.append(time.perf_counter() - start)
            steps = []
            while checkpointer.is_busy:
                steps.append(step())
            written.append(time.perf_counter() - start)
            longest.append(max(steps, default=usual) - usual)  # none where the save was done before the first
            slowed.append(blocked[-1] + sum(steps) - len(steps) * usual)
            if checkpointer.failure is not None:
                raise WorkError(f"a checkpoint could not be written to {directory}: {checkpointer.failure}")
        size = sum((checkpoints.folder / checkpoints.names()[-1]).list_files().values())
    costs = {
        "snapshot, which holds up the loop": blocked,
        "slowest step while it is written, beyond a usual one": longest,
        "all steps until the commit, beyond usual ones": slowed,
        "until the commit": written,
    }
    rows = [
        {"name": name, "median_ms": statistics.median(seconds) * 1e3, "most_ms": max(seconds) * 1e3}
        for name, seconds in costs.items()
    ]
    options = {"model": model, "image_size": image_size, "batch": batch}
    told = {"options": options, "step_ms": usual * 1e3, "checkpoint_bytes": size, "rows": rows}
    return {"benchmark": "checkpoint", **describe(device), **told}
