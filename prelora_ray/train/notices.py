"""When to save and when to stop: rank 0 watches the clock, the driver's request and Ray's notice of preemption."""

from __future__ import annotations

import time

from prelora_ray.config import CheckpointSettings
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.control import Action
from prelora_ray.train.ray_private import preemption

STOP_FILE = "stop.json"
"""The driver's request to stop."""
_LOOK_SECONDS = {True: 0.2, False: 3.0}
"""Between looks for the driver's request, by whether the run folder is on a disk or in a bucket that has to be asked."""


class Notices:
    """What rank 0 wishes after each step."""

    def __init__(self, folder: RunFolder, settings: CheckpointSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._look_time = self._save_time = time.monotonic()
        self._save_step: int | None = None

    def wish(self, step: int, *, is_busy: bool) -> Action:
        """What rank 0 asks for after `step` steps. `is_busy`: whether a checkpoint is being written."""
        now = time.monotonic()
        if self._save_step is None:
            self._save_step = step
        if preemption() is not None:  # at once: on a node that is about to go, Ray Data decodes no more
            return Action.LEAVE
        if now - self._look_time >= _LOOK_SECONDS[self._folder.is_local]:
            self._look_time = now
            if self._folder.exists(STOP_FILE):
                return Action.STOP
        settings = self._settings
        due = settings.every_steps is not None and step - self._save_step >= settings.every_steps
        due |= settings.every_seconds is not None and now - self._save_time >= settings.every_seconds
        return Action.SAVE if due and not is_busy else Action.NONE

    def saved(self, step: int) -> None:
        """A save has begun after `step` steps."""
        self._save_time, self._save_step = time.monotonic(), step
