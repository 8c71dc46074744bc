"""Rank 0's request reaches every worker after the same step."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from prelora_ray.fault_tolerance.control import Action, Control

REQUESTS = [Action.NONE, Action.SAVE, Action.NONE, Action.NONE, Action.STOP, Action.NONE]


def exchange(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    control = Control()
    asked = [control.exchange(request if rank == 0 else Action.LEAVE) for request in REQUESTS]
    Path(folder, str(rank)).write_text(" ".join(action.name for action in asked))
    dist.destroy_process_group()


def test_every_worker_gets_rank_0s_request_one_step_later(tmp_path):
    start_processes(exchange, (str(tmp_path),), nprocs=3, start_method="forkserver")
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == "NONE NONE SAVE NONE NONE STOP"


def test_a_lone_worker_gets_its_own_at_once():
    control = Control()
    assert [control.exchange(request) for request in REQUESTS] == REQUESTS
