"""Has all workers do the same thing after the same step, though no step waits for another worker."""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.distributed as dist


class Action(IntEnum):
    """What rank 0 asks all workers to do."""

    NONE = 0
    SAVE = 1
    """Gather what a checkpoint needs, which rank 0 then writes."""
    STOP = 2
    """Save, wait until it is committed, and end: the driver was asked to stop."""
    LEAVE = 3
    """Save, wait until it is committed, and end: the driver goes on without the nodes that are about to go."""


class Control:
    """Rank 0's request of one step reaches all workers at the next one, by a broadcast that runs beside the step."""

    def __init__(self) -> None:
        self._group = None
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not self._is_alone:  # a group of its own, on the CPU: it must not queue behind gradients
            self._group = dist.new_group(backend="gloo")
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, request: Action) -> Action:
        """Takes this step's request (rank 0's counts) and returns that of the step before, on every worker."""
        if self._is_alone:
            return request
        asked = Action.NONE
        if self._pending is not None:
            box, work = self._pending
            work.wait()
            asked = Action(int(box))
        box = torch.tensor(int(request))
        work = dist.broadcast(box, src=0, group=self._group, async_op=True)
        assert work is not None
        self._pending = box, work
        return asked
