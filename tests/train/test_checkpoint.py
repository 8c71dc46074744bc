from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prelora_ray.storage import Storage
from prelora_ray.train.checkpoint import Checkpoint, Checkpoints, DamagedCheckpointError


def checkpoint(epoch: int, batch: int = 0) -> Checkpoint:
    torch.manual_seed(epoch)
    return Checkpoint(
        state={"epoch": epoch, "batch": batch},
        model={"head.weight": torch.randn(3, 4, dtype=torch.float64)},
        optimizer={"head.weight": {"exp_avg": torch.randn(3, 4), "step": torch.tensor(7.0)}},
        base={"blocks.0.attn.qkv.weight": torch.ones(2, 2)},
        adapter={"a": torch.randn(2)},
        adapter_config={"r": 8},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(Storage(tmp_path))
    for epoch in (1, 2, 10):
        checkpoints.save(checkpoint(epoch))
    return checkpoints


def test_round_trip_keeps_every_bit(saved):
    assert saved.names() == ["00001-000000", "00002-000000", "00010-000000"]
    loaded, expected = saved.load("00002-000000"), checkpoint(2)
    assert loaded.state == expected.state
    assert loaded.adapter_config == expected.adapter_config
    for part in ("model", "base", "adapter"):
        ours, theirs = getattr(loaded, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert torch.equal(loaded.optimizer["head.weight"]["exp_avg"], expected.optimizer["head.weight"]["exp_avg"])
    assert loaded.optimizer["head.weight"]["step"] == 7


def test_frozen_base_is_stored_once(saved, tmp_path):
    assert len(list(tmp_path.rglob("base.safetensors"))) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damage_is_found_and_the_one_before_is_used(saved, tmp_path, file, damage):
    path = tmp_path / "checkpoints" / "00010-000000" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-1])
    with pytest.raises(DamagedCheckpointError, match="00010-000000"):
        saved.load("00010-000000")
    name, messages = saved.newest()
    assert name == "00002-000000"
    assert len(messages) == 1


def test_a_save_without_its_manifest_is_no_checkpoint(saved, tmp_path):
    (tmp_path / "checkpoints" / "00010-000000" / "manifest.json").unlink()
    assert saved.newest() == ("00002-000000", [])


def test_prune_keeps_the_newest_and_the_named(saved):
    saved.prune(1, {"00001-000000"})
    assert saved.names() == ["00001-000000", "00010-000000"]


def test_nothing_saved(tmp_path):
    assert Checkpoints(Storage(tmp_path)).newest() == (None, [])
