"""When an attempt saves, and what it does where that fails."""

from __future__ import annotations

import math
import time

from prelora_ray.config import Settings
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.fault_tolerance.async_checkpointer import AsyncCheckpointer
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, Retention
from prelora_ray.fault_tolerance.control import Action
from prelora_ray.fault_tolerance.notices import Notices
from prelora_ray.fault_tolerance.watchdog import Watchdog
from prelora_ray.train.recorder import Recorder

_LAST_SAVES = 10
"""How often the end of a run tries to save, where a try takes no time."""


class Saving:
    """Of a worker other than rank 0, which saves nothing."""

    failure: str | None = None
    """Why the last save failed; None where it has not."""

    def request(self) -> Action:
        """What to ask all workers for after this step."""
        return Action.NONE

    def save(self, sums: list[list[float]], *, must: bool, score: float | None = None) -> None:
        """Saves where the run stands, beside training.

        Where another save is still under way, it waits: as long as that takes if it `must`, half of
        `workers.hang_seconds` at an epoch's end, not at all inside an epoch. After that this save is left out: the next
        one is as good. The other workers wait for rank 0 meanwhile, and have to know where that may take long. `sums`:
        the epoch's sums so far of every worker; empty at its end. `score`: as `Snapshot` has it.
        """

    def wait(self) -> None:
        """Returns when nothing is being saved."""

    def ensure_saved(self) -> None:
        """As `wait`; where the save failed, tries again for a while: nothing newer will be saved."""

    def record(self) -> None:
        """Records what became of saves since the last call."""

    def newest(self) -> str | None:
        """Name of the newest checkpoint that this worker knows of."""
        return None

    def close(self) -> None: ...


class RankZeroSaving(Saving):
    """Of rank 0."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: Settings,
        state: TrainState,
        notices: Notices,
        recorder: Recorder,
        watchdog: Watchdog,
    ) -> None:
        trunk_epochs = settings.method.window_epochs if settings.checkpoint.keep_trunk else None
        self._checkpointer = AsyncCheckpointer(
            checkpoints, Retention(settings.checkpoint.keep, trunk_epochs), write_first=recorder.flush
        )
        self._checkpoints = checkpoints
        self._hang_seconds = settings.workers.hang_seconds
        self._state = state
        self._notices = notices
        self._recorder = recorder
        self._watchdog = watchdog

    @property
    def failure(self) -> str | None:  # type: ignore[override]
        return self._checkpointer.failure

    def request(self) -> Action:
        return self._notices.request(self._state.step, is_busy=self._checkpointer.is_busy)

    def save(self, sums: list[list[float]], *, must: bool, score: float | None = None) -> None:
        def snapshot() -> Snapshot:
            return self._state.snapshot(sums, holds_base=self._checkpoints.holds_base, score=score)

        is_inside_epoch = bool(sums)
        patience = 0.0 if is_inside_epoch or self.failure is not None else self._hang_seconds / 2
        has_begun = self._checkpointer.start(snapshot, math.inf if must else patience, self._watchdog.beat)
        self.record()
        if has_begun:
            self._notices.saved(self._state.step)

    def wait(self) -> None:
        self._checkpointer.wait(meanwhile=self._watchdog.beat)

    def ensure_saved(self) -> None:
        self.wait()
        end = time.monotonic() + self._hang_seconds
        while self.failure is not None and time.monotonic() < end:
            time.sleep(self._hang_seconds / _LAST_SAVES)
            self._checkpointer.retry(self._watchdog.beat)
        self.record()

    def record(self) -> None:
        self._recorder.saved(self._checkpointer.results())

    def newest(self) -> str | None:
        names = self._checkpoints.names()
        return names[-1] if names else None

    def close(self) -> None:
        self._notices.close()
