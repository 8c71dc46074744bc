"""What runs cost at their measured speed: GPU-hours of their workers, or on CPUs the CPU-hours that they reserve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from prelora_ray.config import Settings, WorkerSettings
from prelora_ray.records import EpochLine
from prelora_ray.run_folder import RunFolder
from prelora_ray.summaries import by_phase_and_size, in_steady_state


@dataclass(frozen=True)
class Prices:
    """What an hour of a worker costs, and how long an epoch of full training takes: in every run as in the trunk."""

    unit: str
    worker: float
    """Of an hour of a worker, in `unit`."""
    trunk: Settings
    lines: list[EpochLine]
    """Of the trunk's epochs, those that stand."""

    @classmethod
    def of(cls, trunk: RunFolder) -> Prices:
        settings = trunk.read_settings()
        return cls(*unit_of(settings.workers), settings, trunk.epochs())

    def straight(self, lines: Sequence[EpochLine], settings: Settings) -> float:
        """Cost of a straight run with these settings: each epoch as in the steady state of its phase and size of
        images. What a stopped one lacks is in its last phase; a size that it has not had there takes what full training
        of it takes more. `lines`: of its epochs, those that stand.

        That leaves out what the start of a process, of a phase or of a fork adds to an epoch.
        """
        stages = by_phase_and_size(lines, settings.image_size)
        measured = stages | {stage: full for stage, full in self._stages.items() if stage in stages}
        hours = {stage: in_steady_state(lines, _hours) for stage, lines in measured.items()}
        last = list(stages)[-1]
        lacking = [(last[0], settings.image_size(epoch)) for epoch in range(len(lines), settings.train.epochs)]
        for stage in lacking:
            hours.setdefault(stage, hours[last] * self._hours[stage[1]] / self._hours[last[1]])
        counts = Counter(lacking) + Counter({stage: len(own) for stage, own in stages.items()})
        return self.worker * sum(hours[stage] * n for stage, n in counts.items())

    def full(self, settings: Settings) -> float:
        """Cost of full training that the settings describe: the trunk's, or with a nearer end."""
        return self.worker * sum(self._hours[settings.image_size(epoch)] for epoch in range(settings.train.epochs))

    @cached_property
    def _hours(self) -> dict[int, float]:
        """Of an epoch of full training, by the size of its images."""
        return {size: in_steady_state(lines, _hours) for (_, size), lines in self._stages.items()}

    @cached_property
    def _stages(self) -> dict[tuple[str, int], list[EpochLine]]:
        """The trunk's epochs, which are all of full training, by the size of their images."""
        return by_phase_and_size(self.lines, self.trunk.image_size)

    def own(self, run: RunFolder) -> float:
        """Cost of what the run has trained itself, without what a fork took over from its trunk."""
        return self.worker * sum(_hours(line) for line in run.records(EpochLine) if line.attempt >= 0)


def unit_of(workers: WorkerSettings) -> tuple[str, float]:
    """What the cost of a run that has begun is told in, and how much of it an hour of a worker is."""
    return ("GPU-hours", 1.0) if workers.gpu is True else ("CPU-hours", workers.cpus)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[int]:
    """Indices of the (score, cost) pairs on the Pareto front, the cheapest first."""
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
