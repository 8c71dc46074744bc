"""When to save and when to stop: rank 0 watches the clock, the driver, room to grow, and Ray's notice of preemption."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import ray

from prelora_ray.config import CheckpointSettings, WorkerSettings
from prelora_ray.fault_tolerance.control import Action
from prelora_ray.fault_tolerance.ray_private import preemption
from prelora_ray.run_folder import RunFolder

STOP_FILE = "stop.json"
"""The driver's request to stop."""
_POLL_SECONDS = {True: 0.2, False: 3.0}
"""Between polls for the driver's request, by whether the run folder is on a disk; a bucket is polled less often."""
_ROOM_SECONDS = 1.0
"""Between polls for room to grow: Ray Train, which then starts the group again, polls every 5 s."""


def room_to_grow(workers: WorkerSettings, world_size: int, *, uses_gpu: bool) -> bool:
    """Whether the cluster has room for another worker that the run would take."""
    if world_size >= workers.max:
        return False
    free = ray.available_resources()
    return free.get("CPU", 0) >= workers.cpus and free.get("GPU", 0) >= int(uses_gpu)


class StopRequest:
    """Polls for the driver's request beside the loop, as unreachable storage may take minutes to say so."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._closed = threading.Event()
        self.is_there = False
        threading.Thread(target=self._poll, daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _poll(self) -> None:
        while not self.is_there and not self._closed.wait(_POLL_SECONDS[self._folder.is_local]):
            with contextlib.suppress(OSError):  # then nothing is known of a request
                self.is_there = self._folder.exists(STOP_FILE)


class Notices:
    """Decides what rank 0 asks all workers for after each step."""

    def __init__(self, folder: RunFolder, settings: CheckpointSettings, has_room: Callable[[], bool] = lambda: False) -> None:
        """`has_room`: whether the group is about to grow, which costs what was not saved."""
        self._stop_request = StopRequest(folder)
        self._settings = settings
        self._has_room = has_room
        self._had_room = True
        self._room_time = time.monotonic()
        self._save_time = time.monotonic()
        self._save_step: int | None = None

    def request(self, step: int, *, is_busy: bool) -> Action:
        """What rank 0 asks for after `step` steps. `is_busy`: whether a checkpoint is being written."""
        now = time.monotonic()
        if self._save_step is None:
            self._save_step = step
        if preemption() is not None:  # at once: on a node that is about to go, Ray Data decodes no more
            return Action.LEAVE
        if self._stop_request.is_there:
            return Action.STOP
        settings = self._settings
        grows = False
        if now - self._room_time >= _ROOM_SECONDS and not is_busy:
            self._room_time = now
            has_room = self._has_room()
            grows = has_room and not self._had_room
            self._had_room = has_room
        due = settings.every_steps is not None and step - self._save_step >= settings.every_steps
        due |= settings.every_seconds is not None and now - self._save_time >= settings.every_seconds
        return Action.SAVE if (due or grows) and not is_busy else Action.NONE

    def close(self) -> None:
        self._stop_request.close()

    def saved(self, step: int) -> None:
        """A save has begun after `step` steps."""
        self._save_time, self._save_step = time.monotonic(), step
