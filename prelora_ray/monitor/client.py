"""What a worker calls: sends its metrics about once a second, less often in a large group, and never waits."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray

from prelora_ray.monitor.exporter import NAME, NAMESPACE
from prelora_ray.monitor.metrics import RunMetrics, WorkerMetrics

SEND_SECONDS = 1.0
_MOST_MESSAGES = 128
"""That a run's workers send in a second, all together: each takes the exporter some 2 ms of CPU (`bench scale`)."""


def send_seconds(world_size: int) -> float:
    """Between two messages of a worker."""
    return max(SEND_SECONDS, world_size / _MOST_MESSAGES)


class Client:
    """The sender of one source: a worker, by its rank, or the run. Sends nothing where there is no exporter."""

    def __init__(self, run: str, source: str, metrics: WorkerMetrics | RunMetrics, *, enabled: bool = True) -> None:
        self._run = run
        self._source = source
        self._metrics = metrics
        self._due = float("-inf")
        self._actor: Any = None
        if enabled:
            with contextlib.suppress(ValueError):
                self._actor = ray.get_actor(NAME, NAMESPACE)

    @property
    def is_due(self) -> bool:
        return self._actor is not None and time.monotonic() >= self._due

    def send(self, world_size: int) -> None:
        if self._actor is None:
            return
        self._due = time.monotonic() + send_seconds(world_size)
        with contextlib.suppress(ray.exceptions.PendingCallsLimitExceeded, ray.exceptions.RayActorError):
            self._actor.update.remote(self._run, self._source, self._metrics.collect(), world_size)


def tell_end(run: str) -> None:
    """Tells the exporter that a run has ended."""
    with contextlib.suppress(ValueError):
        ray.get_actor(NAME, NAMESPACE).finish.remote(run)
