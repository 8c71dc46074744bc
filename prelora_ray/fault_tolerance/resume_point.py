"""Where an attempt begins, and how the previous one ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import torch

from prelora_ray.engine.agreement import from_rank_0, snapshot_from_rank_0
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import holder
from prelora_ray.records import BEGINNINGS
from prelora_ray.run_folder import RunFolder


@dataclass(frozen=True)
class ResumePoint:
    """What rank 0 finds in the run folder and tells the other workers."""

    attempt: int
    checkpoint: str | None
    """Name of the checkpoint to go on from; None begins the run."""
    damaged: dict[str, str]
    """A sentence for each newer checkpoint that is damaged, by name."""
    cause: str | None
    """Why the previous attempt ended: `preemption`, `stop`, `driver` (it died) or `failure`."""
    seconds: float | None
    """Since the previous attempt last wrote progress.json."""
    last_step: int
    """Steps that the previous attempt had done, by its progress.json."""
    world_size: int | None
    """Workers of the previous attempt."""


def resume_together(
    folder: RunFolder, checkpoints: Checkpoints, rank: int, device: torch.device
) -> tuple[ResumePoint, Snapshot | None]:
    """Where the attempt begins, and the checkpoint that is there, as rank 0 finds them, on every worker.

    Rank 0 alone reads and verifies, however many workers there are; the others get the tensors from it.
    `device`: the worker's.
    """
    point, checkpoint = find_resume_point(folder, checkpoints) if rank == 0 else (None, None)
    return cast(ResumePoint, from_rank_0(point)), snapshot_from_rank_0(checkpoint, device)


def find_resume_point(folder: RunFolder, checkpoints: Checkpoints) -> tuple[ResumePoint, Snapshot | None]:
    checkpoint, damaged = checkpoints.newest()
    events = folder.events()
    attempt = 1 + max((event.attempt for event in events), default=-1)
    last = [event for event in events if event.attempt == attempt - 1]
    cause = None
    if last:
        ends = {"preemption": "preemption", "stop": "stop"}
        cause = next((ends[event.event] for event in reversed(last) if event.event in ends), None)
        cause = cause or ("driver" if _driver_started(folder) > last[-1].time else "failure")
    try:
        progress = folder.read_progress()
        seconds, last_step = time.time() - progress.time, progress.step
    except (OSError, ValueError, TypeError):
        seconds, last_step = None, 0
    sizes = [event.world_size for event in last if isinstance(event, BEGINNINGS)]
    name = checkpoint.name if checkpoint else None
    return ResumePoint(attempt, name, damaged, cause, seconds, last_step, sizes[-1] if sizes else None), checkpoint


def _driver_started(folder: RunFolder) -> float:
    try:
        return float((holder(folder) or {}).get("since", 0.0))
    except (OSError, ValueError, TypeError):
        return 0.0
