"""What Ray Train, and Tune above it, hears of each epoch."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from prelora_ray.method.phases import Decision

if TYPE_CHECKING:
    from prelora_ray.train.attempt import Session


def report(session: Session, line: dict[str, Any], decision: Decision) -> None:
    """Reports an epoch (its line of epochs.jsonl), the last one from rank 0 with a tiny checkpoint that points to ours.

    Ray's result has metrics where some report carried a checkpoint. One with each epoch would have Ray write to the run
    folder each time, and end the attempt where the disk is full.
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
    is_last = session.state.epoch == session.settings.train.epochs
    if session.rank != 0 or not is_last or session.saver.failure is not None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as directory:
        names = session.checkpoints.names()
        pointer = {"run": str(session.folder), "checkpoint": names[-1] if names else None}
        Path(directory, "pointer.json").write_text(json.dumps(pointer))
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(directory))


def _summary(ranks: list[int]) -> dict[str, Any]:
    counts = {str(rank): ranks.count(rank) for rank in sorted(set(ranks))}
    return {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks), "counts": counts}
