"""When to save and when to stop: rank 0 watches the clock, the driver's request and Ray's notice of preemption."""

from __future__ import annotations

import time
from typing import Any

import ray.train

from prelora_ray.config import CheckpointSettings
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.control import Action

STOP_FILE = "stop.json"
"""The driver's request to stop."""
_LOOK_SECONDS = 3.0
_MARGIN_SECONDS = 5.0
"""How long before a node goes its workers stop, beside what saving takes."""


class Notices:
    """What rank 0 wishes after each step, and what all workers know of a preemption."""

    def __init__(self, folder: RunFolder, settings: CheckpointSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._look_time = self._save_time = time.monotonic()
        self._save_step: int | None = None
        self._is_noticed = False
        self.preemption: Any = None
        """Ray's PreemptionInfo, the same on every worker; None while no node is about to go."""

    def wish(self, step: int, *, is_busy: bool) -> Action:
        """What rank 0 asks for after `step` steps. `is_busy`: whether a checkpoint is being written."""
        now = time.monotonic()
        if self._save_step is None:
            self._save_step = step
        wish = Action.NONE
        if now - self._look_time >= _LOOK_SECONDS:
            self._look_time = now
            wish |= Action.LOOK
            if self._folder.exists(STOP_FILE):
                return Action.STOP
        if self.preemption is not None:
            deadline = self.preemption.deadline_ms
            if deadline is not None and time.time() > deadline / 1000 - _MARGIN_SECONDS:
                return Action.STOP
            if not self._is_noticed:
                self._is_noticed = True
                return wish | Action.SAVE
        settings = self._settings
        due = settings.every_steps is not None and step - self._save_step >= settings.every_steps
        due |= settings.every_seconds is not None and now - self._save_time >= settings.every_seconds
        return wish | Action.SAVE if due and not is_busy else wish

    def saved(self, step: int) -> None:
        """A save has begun after `step` steps."""
        self._save_time, self._save_step = time.monotonic(), step

    def look(self) -> None:
        """Asks Ray whether a node is about to go; all workers call it together."""
        self.preemption = ray.train.get_preemption_info() or self.preemption
