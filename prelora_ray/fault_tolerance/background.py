"""Work beside the loop that takes as long as the storage does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

_BEAT_SECONDS = 1.0


class Background:
    """A thread that does one thing at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, work: Callable[[], object]) -> None:
        """Begins `work`, which must not raise. Nothing else may be under way."""
        assert not self.is_busy
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def wait(self, seconds: float = math.inf, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Returns when nothing is under way, or after so many seconds; calls `meanwhile` every second until then."""
        end = time.monotonic() + seconds
        while self._thread is not None and self.is_busy and time.monotonic() < end:
            self._thread.join(min(_BEAT_SECONDS, max(0.0, end - time.monotonic())))
            meanwhile()
