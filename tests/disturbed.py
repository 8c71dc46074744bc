"""A run on this process's Ray that things happen to."""

from __future__ import annotations

import functools
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelora_ray.config import Settings
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.records import Progress
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import train
from tests.chaos.faults import FAULTS, Target
from tests.chaos.site import OwnRay, wait_for
from tests.prometheus import Prometheus
from tests.runs import FREEZE, SWITCH, wait_inside

EACH_PHASE = {1: "worker killed", SWITCH: "controller killed", FREEZE: "checkpoint damaged"}
"""A fault inside an epoch of each phase."""
KILLED_IN_EACH_PHASE = dict.fromkeys(EACH_PHASE, "worker killed")


class Disturber(threading.Thread):
    """Lets faults happen to a run, each inside an epoch (from 0)."""

    def __init__(self, run: Settings, faults: dict[int, str]) -> None:
        super().__init__(daemon=True)
        self._target = Target(OwnRay(), Path(), RunFolder.of(run), random.Random(0), {})
        self._faults = faults
        self.phases: list[str] = []
        """Those that the run stood in."""

    def run(self) -> None:
        folder, attempt = self._target.folder, -1
        for epoch, kind in self._faults.items():
            wait_inside(folder, epoch)
            attempt = wait_for(functools.partial(_later_attempt, folder, attempt), 120, "a later attempt").attempt
            FAULTS[kind](self._target)
            self.phases.append(Checkpoints(folder).newest()[0].state["phases"]["phase"])


def _later_attempt(folder: RunFolder, before: int) -> Progress | None:
    """Where an attempt trains that is a later one: workers outlive their controller for a while."""
    place = folder.read_place()
    return place if isinstance(place, Progress) and place.attempt > before else None


@dataclass
class Disturbed:
    """A run that went on to its end."""

    run: Settings
    result: dict[str, Any]
    phases: list[str]
    """Those in which something happened to it."""
    prometheus: Prometheus | None = None
    """One that watched it."""


def train_disturbed(run: Settings, faults: dict[int, str]) -> Disturbed:
    disturber = Disturber(run, faults)
    disturber.start()
    return Disturbed(run, train(run), disturber.phases)
