"""What rank 0 decides holds on every worker: elsewhere weights and losses may differ in their last bits."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist

from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.method.phases import Decision, PhaseSchedule

T = TypeVar("T")
_PIECE_BYTES = 2**26
"""What of a tensor goes to the other workers at once."""


def from_rank_0(content: T) -> T:
    """What rank 0 passes in, on every worker; in one process alone, what it passes in itself."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return content
    box = [content]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def snapshot_from_rank_0(snapshot: Snapshot | None, device: torch.device) -> Snapshot | None:
    """Rank 0's snapshot, on the CPU of every worker; None where it has none. The others pass in None.

    `device`: where this worker's process group takes tensors from. They go one after the other in pieces of 64 MiB, so
    that beside the snapshot itself a worker holds one piece, on `device`.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return snapshot
    is_source = dist.get_rank() == 0
    outline = None if snapshot is None else snapshot.with_each(lambda tensor: torch.empty_like(tensor, device="meta"))
    outline = from_rank_0(outline)
    if outline is None:
        return None
    staging = torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device)

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.contiguous() if is_source else torch.empty(tensor.shape, dtype=tensor.dtype)
        for piece in whole.reshape(-1).view(torch.uint8).split(len(staging)):
            staged = staging[: len(piece)]
            if is_source:
                staged.copy_(piece)
            dist.broadcast(staged, src=0)
            if not is_source:
                piece.copy_(staged)
        return whole

    return (outline if snapshot is None else snapshot).with_each(sent)


def agreed(schedule: PhaseSchedule, decision: Decision | None) -> Decision:
    """Rank 0's decision, with the schedule where rank 0's has come to. The others' own, if any, do not count."""
    decision, state = from_rank_0((decision, schedule.state_dict()))
    schedule.load_state_dict(state)
    return cast(Decision, decision)
