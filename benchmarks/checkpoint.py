"""What a checkpoint costs the loop beside which it is written.

    python benchmarks/checkpoint.py [MODEL] [BATCH]

Steps of a timm model (default vit_base_patch16_224, 256 images), then a snapshot, then steps while it is written to the
disk, checksummed and committed. `blocked_ms` is how long the snapshot holds up the loop, with the wait for the device.
`longest_ms` is how much longer than usual the slowest step took while it was written, `slowed_ms` how much longer all
of these steps took together, until the commit.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time

import torch

from prelora_ray.config_file import parse_settings
from prelora_ray.engine.state import TrainState
from prelora_ray.fault_tolerance.async_checkpointer import AsyncCheckpointer
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, Retention
from prelora_ray.storage import Storage

_ROUNDS = 5


def main(model: str, batch: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = parse_settings({"name": "x", "data": {"path": "x"}, "model": {"name": model}, "train": {"compile": False}})
    state = TrainState(settings, 1000, 10**6, device, 1)
    images = torch.randn(batch, 3, 224, 224, device=device)

    def step() -> float:
        start = time.perf_counter()
        with state.autocast():
            loss = state.network(images).float().logsumexp(-1).mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
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
            if device.type == "cuda":
                torch.cuda.synchronize()
            blocked.append(time.perf_counter() - start)
            steps = []
            while checkpointer.is_busy:
                steps.append(step())
            written.append(time.perf_counter() - start)
            longest.append(max(steps) - usual)
            slowed.append(blocked[-1] + sum(steps) - len(steps) * usual)
            assert checkpointer.failure is None
        size = sum((checkpoints.folder / checkpoints.names()[-1]).list_files().values())
    result = {
        "model": model,
        "batch": batch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "checkpoint_bytes": size,
        "step_ms": usual * 1e3,
        "blocked_ms": {"median": statistics.median(blocked) * 1e3, "most": max(blocked) * 1e3},
        "longest_ms": {"median": statistics.median(longest) * 1e3, "most": max(longest) * 1e3},
        "slowed_ms": {"median": statistics.median(slowed) * 1e3, "most": max(slowed) * 1e3},
        "seconds_to_commit": statistics.median(written),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "vit_base_patch16_224", int(sys.argv[2]) if len(sys.argv) > 2 else 256)
