"""Where an attempt of three workers begins: all at the same bits, which rank 0 alone has read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from prelora_ray.engine import agreement
from prelora_ray.engine.agreement import snapshot_from_rank_0
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.resume_point import resume_together
from prelora_ray.run_folder import RunFolder
from tests.runs import assert_same_bits

WORKERS = 3
OLDER, NEWEST = "00001-000000", "00002-000000"


class Counted(RunFolder):
    """Counts the bytes that are read of it and of what is below it."""

    def __init__(self, uri: Any) -> None:
        super().__init__(uri)
        self.bytes_of: dict[str, int] = {}

    def read_bytes(self, name: str) -> bytes:
        content = super().read_bytes(name)
        self.bytes_of[name] = self.bytes_of.get(name, 0) + len(content)
        return content


ODD = {"transposed": torch.arange(600.0).view(20, 30).t(), "of no dimension": torch.tensor(7), "empty": torch.zeros(0, 3)}


def snapshot(epoch: int) -> Snapshot:
    torch.manual_seed(epoch)
    return Snapshot(
        state={"epoch": epoch, "batch": 0, "phases": {"phase": "lora"}, "sums": [[1.5, 2.0]]},
        model={"head.weight": torch.randn(300, 70, dtype=torch.float64), "a.bias": torch.randn(7)},
        optimizer={"head.weight": {"exp_avg": torch.randn(300, 70), "step": torch.tensor(7.0)}},
        base={"blocks.0.attn.qkv.weight": torch.arange(4096.0).view(64, 64).bfloat16()},
        refers_to_base=True,
        adapter={"a": torch.randn(2, 3).t()},
        adapter_config={"r": 8},
        ema={"head.weight": torch.randn(300, 70)},
        score=0.25,
    )


def resume(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=WORKERS)
    agreement._PIECE_BYTES = 1000  # most tensors are longer
    folder = Counted(f"{path}/run")
    point, found = resume_together(folder, Checkpoints(folder), rank, torch.device("cpu"))
    if point.checkpoint is None:
        assert found is None
    else:
        assert found is not None
        assert_same_bits(found, Checkpoints(RunFolder(folder.uri)).load(point.checkpoint))
        assert (found.adapter_config, found.refers_to_base, found.score) == ({"r": 8}, True, 0.25)
    own = Snapshot(state={}, model=ODD, optimizer={}) if rank == 0 else None
    sent = snapshot_from_rank_0(own, torch.device("cpu"))
    assert sent is not None and all(torch.equal(sent.model[name], tensor) for name, tensor in ODD.items())
    Path(path, f"told-{rank}").write_text(json.dumps([point.checkpoint, point.damaged, folder.bytes_of]))
    dist.destroy_process_group()


def resume_all(path: Path) -> list[tuple[str | None, dict[str, str], dict[str, int]]]:
    """Of each worker, which has the checkpoint's bits: its name, damaged ones, and bytes read by file."""
    start_processes(resume, (str(path),), nprocs=WORKERS, start_method="forkserver")
    return [tuple(json.loads((path / f"told-{rank}").read_text())) for rank in range(WORKERS)]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_rank_0_alone_reads_the_checkpoint_and_all_workers_have_its_bits(tmp_path, is_damaged):
    checkpoints = Checkpoints(RunFolder(tmp_path / "run"))
    for epoch in (1, 2):
        checkpoints.save(snapshot(epoch))
    if is_damaged:
        file = tmp_path / "run" / "checkpoints" / NEWEST / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    (name, damaged, reads), *others = resume_all(tmp_path)
    assert name == (OLDER if is_damaged else NEWEST)
    assert list(damaged) == ([NEWEST] if is_damaged else [])
    for file in ("model.safetensors", "base.safetensors", "ema.safetensors"):
        assert reads[file] > 0, file
    assert all(other == (name, damaged, {}) for other in others)


def test_without_a_checkpoint_all_workers_begin_the_run(tmp_path):
    (tmp_path / "run").mkdir()
    for name, damaged, _ in resume_all(tmp_path):
        assert (name, damaged) == (None, {})
