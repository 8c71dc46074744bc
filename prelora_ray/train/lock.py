"""One driver to a run folder: a heartbeat file, as object stores know no locks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

import psutil

from prelora_ray.run_folder import RunFolder

FILE = "driver.json"
BEAT_SECONDS = 5.0
OLD_SECONDS = 60.0
"""A heartbeat older than this is a dead driver's."""


class HeldRunError(ValueError):
    """Another driver trains the run."""


class DriverLock:
    """Holds a run folder for the time of a block.

    Raises HeldRunError where another driver holds it. One that died on this machine is seen at once,
    one on another machine when its heartbeat is old.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._content: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "since": time.time(),
        }

    def __enter__(self) -> DriverLock:
        other = self._other()
        if other is not None:
            raise HeldRunError(
                f"run {self._folder} is being trained by process {other['pid']} on {other['host']}: wait for it, stop it, "
                "or give another --name"
            )
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._folder.remove_file(FILE)

    def _other(self) -> dict[str, Any] | None:
        """The living driver that holds the folder."""
        if not self._folder.exists(FILE):
            return None
        try:
            other: dict[str, Any] = self._folder.read_json(FILE)
            is_fresh = time.time() - other["time"] < OLD_SECONDS
        except (OSError, ValueError, KeyError, TypeError):
            return None  # a damaged lock holds nothing
        if other["host"] == self._content["host"]:
            return other if _is_running(other["pid"], other["started"]) else None
        return other if is_fresh else None

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # on a full disk the next beat tries again
                self._write()

    def _write(self) -> None:
        self._folder.write_bytes(FILE, json.dumps({**self._content, "time": time.time()}).encode())


def _is_running(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1  # the number may have gone to another process
    except psutil.NoSuchProcess:
        return False
