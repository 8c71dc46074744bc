"""Ends a worker that makes no progress, so that Ray Train starts the group again."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

PATIENCE = 10
"""A start, a compilation or a last save may take so many times a step's limit."""
OUTAGE_PATIENCE = PATIENCE // 2
"""An attempt's start, and the driver between two, wait so many times a step's limit for unreachable storage."""


class Watchdog:
    """A worker that has shown no sign of life for `seconds` prints where it hangs, and exits.

    A collective waits for every worker, so one that is stopped or lost holds up all others; each of
    them ends itself.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ended = threading.Event()
        self.beat(patiently=True)
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, *, patiently: bool = False) -> None:
        """A sign of life. With `patiently`, what comes next may take `PATIENCE` times as long."""
        self._deadline = time.monotonic() + self._seconds * (PATIENCE if patiently else 1)

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() > self._deadline:
                print(f"no progress for {self._seconds:g} s: this worker ends itself", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)
