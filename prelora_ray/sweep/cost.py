"""What runs cost at their measured speed, in GPU-hours of all workers (on CPUs a worker counts as a GPU)."""

from __future__ import annotations

from collections.abc import Iterable

from prelora_ray.records import EpochLine, by_phase_and_size, in_steady_state
from prelora_ray.run_folder import RunFolder


def straight_hours(run: RunFolder, epochs: int) -> float:
    """Cost of a straight run of so many epochs: each as in the steady state of its phase and size of images, and what a
    stopped one lacks as the last.

    That leaves out what the start of a process, of a phase or of a fork adds to an epoch.
    """
    stages = by_phase_and_size(run.epochs())
    counts = {stage: len(lines) for stage, lines in stages.items()}
    counts[list(stages)[-1]] += epochs - sum(counts.values())
    return sum(in_steady_state(stages[stage], _hours) * count for stage, count in counts.items())


def own_hours(run: RunFolder) -> float:
    """Cost of what the run has trained itself, without what a fork took over from its trunk."""
    return sum(_hours(line) for line in run.records(EpochLine) if line.attempt >= 0)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[int]:
    """Indices of the (accuracy, cost) pairs on the Pareto front, the cheapest first."""
    front: list[int] = []
    best = float("-inf")
    points = list(points)
    for index in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0])):
        if points[index][0] > best:
            best = points[index][0]
            front.append(index)
    return front


def _hours(line: EpochLine) -> float:
    return line.seconds * line.world_size / 3600
