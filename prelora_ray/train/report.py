"""What Ray Train, and Tune above it, hears of each epoch."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from prelora_ray.method.phases import Decision
from prelora_ray.run_folder import RunFolder

if TYPE_CHECKING:
    from prelora_ray.train.session import Session

_ROOM_BYTES = 2**18
"""More than Ray writes to the run folder at a report."""


def report(session: Session, line: dict[str, Any], decision: Decision) -> None:
    """Reports an epoch (its line of epochs.jsonl), from rank 0 with a tiny checkpoint that points to ours.

    Where there is no room for ours there is none for Ray's, which would end the attempt: then it gets none.
    """
    phases, method = session.state.phases, session.settings.method
    metrics = {
        **line,
        "trainable_fraction": line["trainable_parameters"] / line["parameters"],
        "next_phase": phases.phase.value,
        "switch_epoch": phases.switched_at,
        "freeze_epoch": phases.frozen_at,
        "tau": method.tau,
        "zeta": method.zeta,
        "norm_change": decision.verdict and decision.verdict.family_change,
        "loss_change": decision.verdict and decision.verdict.loss_change,
        "converged": decision.verdict and decision.verdict.converged,
        "ranks": phases.ranks and _summary(list(phases.ranks.values())),
    }
    if session.rank != 0 or session.saver.has_failed or not _has_room(session.folder):
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as directory:
        names = session.checkpoints.names()
        pointer = {"run": str(session.folder), "checkpoint": names[-1] if names else None}
        Path(directory, "pointer.json").write_text(json.dumps(pointer))
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(directory))


def _has_room(folder: RunFolder) -> bool:
    try:
        folder.write_bytes("ray.tmp", bytes(_ROOM_BYTES))
    except OSError:
        return False
    folder.remove_file("ray.tmp")
    return True


def _summary(ranks: list[int]) -> dict[str, Any]:
    counts = {str(rank): ranks.count(rank) for rank in sorted(set(ranks))}
    return {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks), "counts": counts}
