"""What an epoch reports to Ray Train, and to Tune above it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ray.train

from prelora_ray.engine.state import TrainState
from prelora_ray.method.phases import Decision
from prelora_ray.records import EpochLine, to_json
from prelora_ray.summaries import rank_counts


def join_report() -> None:
    """What a worker other than rank 0 calls where rank 0 calls `report_to_ray`.

    Ray Train waits for a report of every worker, and goes by rank 0's. An epoch's line tells of each worker, so that
    with it from all of them its controller would take in the square of their number.
    """
    ray.train.report({})


def report_to_ray(line: EpochLine, decision: Decision, state: TrainState, pointer: dict[str, Any] | None) -> None:
    """Reports an epoch (its line of epochs.jsonl) to Ray Train, with a tiny checkpoint that holds `pointer`, if given.

    Ray's result has metrics only if some report carried a checkpoint, so the last epoch has one, which points to ours.
    With one each epoch Ray would write to the run folder each time, and end the attempt where the disk is full.
    """
    phases, method, verdict = state.phases, state.settings.method, decision.verdict
    metrics = {
        **to_json(line),
        "trainable_fraction": line.trainable_fraction,
        "next_phase": phases.phase.value,
        "switch_epoch": phases.switched_at,
        "freeze_epoch": phases.frozen_at,
        "tau": method.tau,
        "zeta": method.zeta,
        "norm_change": verdict and verdict.family_change,
        "loss_change": verdict and verdict.loss_change,
        "converged": verdict and verdict.converged,
        "ranks": phases.ranks and _summary(phases.ranks),
    }
    if pointer is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "pointer.json").write_text(json.dumps(pointer))
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(directory))


def _summary(ranks: dict[str, int]) -> dict[str, Any]:
    counts = {str(rank): count for rank, count in rank_counts(ranks).items()}
    values = ranks.values()
    return {"min": min(values), "max": max(values), "mean": sum(values) / len(values), "counts": counts}
