"""What each part of a run (rank 0, another worker, the driver, ...) takes for a second, a step and an epoch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from prelora_ray.bench.processes import Usage

Costs = dict[tuple[str, str, str], float]
"""By part, each of what, and what was measured: `("rank 0", "step", "cpu_ms")`."""
_WORKER, _NODE, _HEAD = "another worker", "another node", "head"
_TITLES = {
    "RayTrainWorker": _WORKER,
    "TrainController": "Ray Train's controller",
    "SynchronizationActor": "Ray Train's barrier",
    "PreemptionWatcher": "Ray Train's watcher",
    "ray::Exporter": "exporter",
}
_OF_A_NODE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""What Ray calls the processes of a part; all else that it calls so is another actor."""
_EACH = ("second", "step", "epoch")


@dataclass(frozen=True)
class Sample:
    """What all processes of a run had used at a moment."""

    time: float
    driver: int
    rank_0: int
    """Process numbers; 0 where there is no worker yet."""
    processes: dict[int, Usage]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Sample:
        content = json.loads(line)
        content["processes"] = {int(pid): _usage(usage) for pid, usage in content["processes"].items()}
        return cls(**content)

    def part(self, pid: int) -> str:
        """Which part of the run a process is."""
        if pid in (self.driver, self.rank_0):
            return "driver" if pid == self.driver else "rank 0"
        own = self.processes[pid].command
        for title, part in _TITLES.items():
            if title in own:
                return part
        if own.startswith("ray::") and not own.startswith(_OF_A_NODE):
            return "other actors"
        while pid in self.processes:
            if "/raylet " in (command := self.processes[pid].command):
                return _HEAD if " --head" in command else _NODE
            pid = self.processes[pid].parent
        return _HEAD


@dataclass(frozen=True)
class Span:
    """What a run did between two samples."""

    begin: Sample
    end: Sample
    steps: int = 0
    epochs: int = 0

    @property
    def seconds(self) -> float:
        return self.end.time - self.begin.time

    def used(self) -> Costs:
        """By all processes of each part together; a process that begins here has used nothing before."""
        found: Costs = {}
        for pid, now in self.end.processes.items():
            before = self.begin.processes.get(pid)
            sockets = before.sockets if before is not None else {}
            carried = [(counts, sockets.get(inode, (0, 0))) for inode, counts in now.sockets.items()]
            packets, size = (sum(counts[i] - old[i] for counts, old in carried) for i in range(2))
            cpu = now.cpu - (before.cpu if before is not None else 0.0)
            for what, value in (("cpu_ms", 1e3 * cpu), ("packets", packets), ("bytes", size)):
                figure = self.end.part(pid), "", what
                found[figure] = found.get(figure, 0.0) + value
        return found


def costs(start: Span, told: Sequence[Span], restart: Span, workers: int, nodes: int) -> Costs:
    """What each part takes; of the workers but rank 0, and of the nodes but the head, the mean.

    `told`: three spans with other shares of seconds, steps and epochs, which these are solved from; what comes out
    below 0 is 0.
    """
    found: Costs = {}
    system = np.array([(span.seconds, span.steps, span.epochs) for span in told])
    used = [span.used() for span in told]
    for figure in used[0]:
        solved = np.linalg.solve(system, [of_span.get(figure, 0.0) for of_span in used])
        found |= {_of(figure, each): max(0.0, value) for each, value in zip(_EACH, solved.tolist(), strict=True)}
    for each, span in (("start", start), ("restart", restart)):
        found |= {_of(figure, each): value for figure, value in span.used().items() if figure[2] == "cpu_ms"}
    found |= _held(told[-1].end)
    of_several = {_WORKER: max(1, workers - 1), _NODE: nodes}
    mean = {figure: value / of_several.get(figure[0], 1) for figure, value in found.items()}
    return mean | {("run", "start", "seconds"): start.seconds, ("run", "restart", "seconds"): restart.seconds}


def _held(sample: Sample) -> Costs:
    found: Costs = {}
    for pid, usage in sample.processes.items():
        for what, value in (("memory_mib", usage.memory / 2**20), ("open_files", usage.files)):
            figure = sample.part(pid), "process", what
            found[figure] = found.get(figure, 0.0) + value
    return found


def _of(figure: tuple[str, str, str], each: str) -> tuple[str, str, str]:
    part, _, what = figure
    return part, each, what


def _usage(content: dict[str, object]) -> Usage:
    sockets: Iterable[tuple[str, list[int]]] = content.pop("sockets").items()  # type: ignore[attr-defined]
    return Usage(**content, sockets={int(inode): (counts[0], counts[1]) for inode, counts in sockets})  # type: ignore[arg-type]
