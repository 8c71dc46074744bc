"""What takes a run's scalars to a service, from a thread that the run never waits for."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal, Protocol, TypeVar

from prelora_ray.fault_tolerance.background import Background
from prelora_ray.monitor.scalars import Pixels, Scalars
from prelora_ray.storage import without_keys

logger = logging.getLogger(__name__)
T = TypeVar("T")

Outcome = Literal["finished", "failed", "stop"]
"""How a run ended; `stop`: it was asked to, and may go on."""
_RETRY_SECONDS = 10.0
_END_SECONDS = 30.0
"""How long the end of a run waits for what has not arrived. Another attempt, if there is one, sends it again."""


class Tracker(Protocol):
    """A run at a service that several processes go on with, one after the other. Any method may raise, or take long."""

    @property
    def last_step(self) -> int:
        """The last step that the service has, as it was when this object was made; 0 or less without any."""

    def scalars(self, step: int, values: Scalars, seconds: float) -> None:
        """Logs a step's values once, also where it is called again because it raised. `seconds`: their time."""

    def samples(self, step: int, page: Pixels) -> None:
        """Logs a sheet of training images."""

    def end(self, outcome: Outcome) -> None:
        """The run has ended."""


class _GivenUpError(Exception):
    """What has not arrived is another attempt's to send."""


class Courier:
    """Takes to a tracker all that the run has recorded and records, each step once.

    What fails is tried again for as long as the run goes on. A step that the service has already is left out: the run
    may have trained it again. What it lacks, as it could not be reached before, comes later.
    """

    def __init__(self, name: str, connect: Callable[[], Tracker], recorded: Iterable[tuple[int, Scalars]]) -> None:
        """`recorded`: what earlier attempts have, by step."""
        self._name = name
        self._connect = connect
        self._work: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._is_told = False
        """Whether the log has said that something fails."""
        self._is_over = threading.Event()
        """Nobody waits any more for what has not arrived."""
        self._thread = Background()
        for step, values in recorded:
            self.scalars(step, values)
        self._thread.begin(self._deliver)

    def scalars(self, step: int, values: Scalars) -> None:
        now = time.time()
        self._work.put(lambda tracker: tracker.scalars(step, values, now) if step > tracker.last_step else None)

    def samples(self, step: int, page: Pixels) -> None:
        """Tried once: a service may take scalars and have no room for files."""

        def work(tracker: Tracker) -> None:
            if step > tracker.last_step:
                try:
                    tracker.samples(step, page)
                except Exception as error:
                    self._tell("has no sheet of images", error)

        self._work.put(work)

    def end(self, outcome: Outcome, meanwhile: Callable[[], None]) -> None:
        """Waits for a moment until all has arrived; calls `meanwhile` every second until then."""
        self._work.put(lambda tracker: tracker.end(outcome))
        self._work.put(None)
        self._thread.wait(_END_SECONDS, meanwhile)
        if self._thread.is_busy:
            self._is_over.set()
            logger.warning("%s lacks what has not arrived within %g s", self._name, _END_SECONDS)

    def _deliver(self) -> None:
        with contextlib.suppress(_GivenUpError):
            tracker = self._patiently(self._connect)
            while (work := self._work.get()) is not None:
                self._patiently(lambda work=work: work(tracker))  # type: ignore[misc]

    def _patiently(self, call: Callable[[], T]) -> T:
        while True:
            try:
                result = call()
            except Exception as error:  # the service, the network, the extra: none is a reason to train worse
                if not self._is_over.is_set():
                    self._tell("is tried again", error)
                if self._is_over.wait(_RETRY_SECONDS):
                    raise _GivenUpError from None
            else:
                self._is_told = False
                return result

    def _tell(self, what: str, error: Exception) -> None:
        if not self._is_told:
            told = without_keys(str(error))[:300]  # which may name the service's address, with a password in it
            logger.warning("%s %s: %s: %s", self._name, what, type(error).__name__, told)
            self._is_told = True
