"""A run on this process's Ray that things happen to."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelora_ray.config import Settings
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import train
from tests.chaos.faults import FAULTS, Target
from tests.chaos.site import OwnRay
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
        for epoch, kind in self._faults.items():
            wait_inside(self._target.folder, epoch)
            FAULTS[kind](self._target)
            self.phases.append(Checkpoints(self._target.folder).newest()[0].state["phases"]["phase"])


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
