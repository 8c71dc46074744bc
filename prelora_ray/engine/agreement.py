"""What rank 0 decides holds on every worker: elsewhere weights and losses may differ in their last bits."""

from __future__ import annotations

from typing import TypeVar, cast

import torch.distributed as dist

from prelora_ray.method.phases import Decision, PhaseSchedule

T = TypeVar("T")


def from_rank_0(content: T) -> T:
    """What rank 0 passes in, on every worker; in one process alone, what it passes in itself."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return content
    box = [content]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agreed(schedule: PhaseSchedule, decision: Decision | None) -> Decision:
    """Rank 0's decision, with the schedule where rank 0's has come to. The others' own, if any, do not count."""
    decision, state = from_rank_0((decision, schedule.state_dict()))
    schedule.load_state_dict(state)
    return cast(Decision, decision)
