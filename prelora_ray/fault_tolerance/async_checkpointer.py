"""Writes checkpoints beside training, one at a time."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.errors import one_line
from prelora_ray.fault_tolerance.background import Background
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, Retention

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What became of one save."""

    name: str
    seconds: float
    """From the snapshot to the commit, or to the failure."""
    error: str | None
    """Why it failed; None where the checkpoint is committed."""


class AsyncCheckpointer(Background):
    """A thread that writes, commits and prunes. `results` returns what it has done, for the loop to record."""

    def __init__(self, checkpoints: Checkpoints, retention: Retention, write_first: Callable[[], None] = lambda: None) -> None:
        """`write_first`: writes what must be there before a checkpoint is; if it fails, so does the save."""
        super().__init__()
        self._write_first = write_first
        self._checkpoints = checkpoints
        self._retention = retention
        self._results: queue.SimpleQueue[Saved] = queue.SimpleQueue()
        self._failed: Snapshot | None = None
        self.failure: str | None = None
        """Why the last save failed; None where it has not."""

    def start(
        self, take: Callable[[], Snapshot], seconds: float = math.inf, meanwhile: Callable[[], None] = lambda: None
    ) -> bool:
        """Takes a snapshot, which nothing may change any more, and begins to write it.

        Returns False, without a snapshot, where another one is still being written after `seconds`. Calls `meanwhile`
        as `wait` does.
        """
        self.wait(seconds, meanwhile)
        if self.is_busy:
            return False
        self._failed = None  # before another snapshot takes as much memory
        self._save(take())
        return True

    def retry(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Writes once more what could not be written, and waits for it."""
        assert self._failed is not None
        self._save(self._failed)
        self.wait(meanwhile=meanwhile)

    def results(self) -> list[Saved]:
        """What has been saved, or failed to be, since the last call."""
        found = []
        while not self._results.empty():
            found.append(self._results.get())
        return found

    def _save(self, checkpoint: Snapshot) -> None:
        self.begin(lambda: self._write(checkpoint))

    def _write(self, checkpoint: Snapshot) -> None:
        start = time.monotonic()
        error = None
        try:
            self._write_first()
            with _beside_training(checkpoint):
                self._checkpoints.save(checkpoint)
        except OSError as failure:  # a full disk, an unreachable bucket: training goes on, the next save tries again
            error = f"{type(failure).__name__}: {one_line(failure)[:300]}"
        except BaseException:
            logger.exception("saving failed")
            error = "an error of the program, see the worker's log"
        self._failed, self.failure = (None if error is None else checkpoint), error
        self._results.put(Saved(checkpoint.name, time.monotonic() - start, error))
        if error is None:
            try:
                self._checkpoints.prune(self._retention)
            except OSError as failure:  # the checkpoint is there all the same, and the next one prunes again
                logger.warning("older checkpoints stay: %s", failure)


def _beside_training(checkpoint: Snapshot) -> AbstractContextManager[Any]:
    """A stream of its own for the copies from a GPU: in the loop's they would stand in front of its steps."""
    device = next(iter(checkpoint.model.values())).device
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))  # on which the snapshot was taken
    return torch.cuda.stream(stream)
