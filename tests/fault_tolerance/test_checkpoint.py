from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest
import torch

from prelora_ray import storage
from prelora_ray.config_file import parse_settings
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.fault_tolerance.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    OtherSchemaError,
    Retention,
    copy_in_pieces,
)
from prelora_ray.method.phases import Phase
from prelora_ray.storage import Storage


def checkpoint(epoch: int, batch: int = 0) -> Snapshot:
    torch.manual_seed(epoch)
    return Snapshot(
        state={"epoch": epoch, "batch": batch, "phases": {"phase": "lora"}},
        model={"head.weight": torch.randn(3, 4, dtype=torch.float64)},
        optimizer={"head.weight": {"exp_avg": torch.randn(3, 4), "step": torch.tensor(7.0)}},
        base={"blocks.0.attn.qkv.weight": torch.ones(2, 2)},
        refers_to_base=True,
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


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(7, 5),
        torch.randn(8, 6, dtype=torch.float64).t(),
        torch.tensor(7.0),
        torch.arange(32).bool(),
        torch.empty(0, 3),
        torch.randn(33).bfloat16(),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_a_copy_in_pieces_has_every_bit(tensor):
    copy = copy_in_pieces(tensor, torch.empty(48, dtype=torch.uint8))
    assert copy.is_contiguous()
    assert copy.dtype == tensor.dtype
    assert torch.equal(copy, tensor)


def test_frozen_base_is_stored_once(saved, tmp_path):
    assert len(list(tmp_path.rglob("base.safetensors"))) == 1


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "adapter/adapter_model.safetensors"]
)
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
    newest, damaged = saved.newest()
    assert newest is not None and newest.name == "00002-000000"
    assert list(damaged) == ["00010-000000"]
    assert file in damaged["00010-000000"] or damage == "missing"


class Failing:
    """Reads of files whose path holds `part` raise an error, so often; as a disk or a bucket does for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str, times: int, error: OSError | None = None) -> None:
        self.left = times
        read = Storage.read_bytes
        monkeypatch.setattr(storage, "_READ_WAITS", (0.0, 0.0))

        def read_bytes(folder: Storage, name: str) -> bytes:
            if part in folder.file(name) and self.left:
                self.left -= 1
                raise error or OSError(errno.EIO, "Input/output error")
            return read(folder, name)

        monkeypatch.setattr(Storage, "read_bytes", read_bytes)


FILES = ["manifest.json", "model.safetensors", "state.json", "base.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_a_read_that_fails_for_a_moment_is_tried_again(saved, monkeypatch, file):
    failing = Failing(monkeypatch, file, times=2)
    newest, damaged = saved.newest()
    assert newest is not None and newest.name == "00010-000000"
    assert (damaged, failing.left) == ({}, 0)


@pytest.mark.parametrize("file", FILES)
def test_what_cannot_be_read_is_not_taken_for_damaged(saved, monkeypatch, file):
    Failing(monkeypatch, file, times=10**9, error=OSError(errno.EMFILE, "Too many open files"))
    with pytest.raises(OSError, match="Too many open files"):
        saved.newest()


def test_a_checkpoint_whose_manifest_cannot_be_read_is_not_pruned(saved, tmp_path, monkeypatch):
    Failing(monkeypatch, "00001-000000/manifest.json", times=10**9)
    again = Checkpoints(Storage(tmp_path))
    with pytest.raises(OSError, match="Input/output"):
        again.prune(Retention(1))
    assert again.names() == ["00001-000000", "00002-000000", "00010-000000"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema": 3}', b"\x00\x00", b'{"schema": 3, "files": 3, "base": null}']
)
def test_a_manifest_that_is_none_is_damage(saved, tmp_path, content):
    (tmp_path / "checkpoints" / "00010-000000" / "manifest.json").write_bytes(content)
    newest, damaged = saved.newest()
    assert newest is not None and newest.name == "00002-000000"
    assert list(damaged) == ["00010-000000"]


def test_tensors_that_no_reader_takes_are_damage_though_their_checksum_is_right(saved):
    folder = saved.folder / "00010-000000"
    folder.write_bytes("model.safetensors", b"none")
    manifest = folder.read_json("manifest.json")
    manifest["files"]["model.safetensors"] = {"bytes": 4, "sha256": hashlib.sha256(b"none").hexdigest()}
    folder.write_json("manifest.json", manifest)
    assert list(saved.newest()[1]) == ["00010-000000"]


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_damaged_checkpoints_are_set_aside_and_no_longer_count(request, tmp_path, place):
    run = Storage(tmp_path if place == "disk" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}")
    checkpoints = Checkpoints(run)
    for epoch in (1, 2):
        checkpoints.save(checkpoint(epoch))
    content = (checkpoints.folder / "00002-000000").read_bytes("model.safetensors")
    for _ in range(2):  # the second one takes the place of the first
        (checkpoints.folder / "00002-000000").write_bytes("model.safetensors", content[:-1])
        checkpoints.set_aside("00002-000000")
        assert checkpoints.names() == ["00001-000000"]
        checkpoints.save(checkpoint(2))
    (checkpoints.folder / "00001-000000").write_bytes("manifest.json", b"{")
    again = Checkpoints(run)
    again.prune(Retention(1))
    assert again.folder.list_folders() == ["00001-000000.damaged", "00002-000000", "00002-000000.damaged"]
    assert (again.folder / "00002-000000.damaged").read_bytes("model.safetensors") == content[:-1]
    assert again.newest()[1] == {}


@pytest.mark.parametrize(("schema", "own"), [(1, {"val_top1": None}), (4, {})])
def test_a_checkpoint_of_another_version_is_not_taken_for_a_damaged_one(saved, tmp_path, schema, own):
    folder = saved.folder / "00010-000000"
    content = folder.read_json("manifest.json") | {"schema": schema} | own
    del content["score"]
    folder.write_json("manifest.json", content)
    again = Checkpoints(Storage(tmp_path))
    for look in (again.newest, again.check_schema):
        with pytest.raises(OtherSchemaError, match=rf"00010-000000 has schema {schema}, and this version reads 2 and 3"):
            look()
    again.prune(Retention(1))
    assert again.names() == ["00010-000000"]


def test_a_checkpoint_of_schema_2_is_read(saved, tmp_path):
    """In it the score is top-1, by that name."""
    folder = saved.folder / "00010-000000"
    manifest = folder.read_json("manifest.json") | {"schema": 2, "val_top1": 0.75}
    del manifest["score"]
    folder.write_json("manifest.json", manifest)
    again = Checkpoints(Storage(tmp_path))
    assert again.load("00010-000000").score == again.about()["00010-000000"]["score"] == 0.75


def test_a_save_without_its_manifest_is_no_checkpoint(saved, tmp_path):
    (tmp_path / "checkpoints" / "00010-000000" / "manifest.json").unlink()
    newest, damaged = saved.newest()
    assert newest is not None and newest.name == "00002-000000"
    assert damaged == {}


def about(*entries: tuple[int, int, str, float | None]) -> dict[str, dict]:
    return {
        f"{epoch:05d}-{batch:06d}": {"epoch": epoch, "batch": batch, "phase": phase, "score": score}
        for epoch, batch, phase, score in entries
    }


def test_what_stays():
    """Newest two, the best, both sides of each change of phase; with a trunk, phase full at the end of windows."""
    run = about(
        (1, 0, "full", 0.1),
        (2, 0, "full", 0.2),
        (2, 5, "full", None),
        (3, 0, "full", 0.9),
        (3, 7, "full", None),
        (4, 0, "full", 0.3),
        (5, 0, "warmup", 0.3),
        (6, 0, "warmup", 0.4),
        (7, 0, "lora", 0.4),
        (8, 0, "lora", 0.5),
        (9, 0, "lora", 0.6),
        (9, 3, "lora", None),
    )
    plain = {"00003-000000", "00004-000000", "00005-000000", "00006-000000", "00007-000000", "00009-000000", "00009-000003"}
    assert Retention(2).kept(run) == plain
    assert Retention(2, trunk_epochs=2).kept(run) == plain | {"00002-000000"}


def test_prune_removes_what_need_not_stay_and_what_was_never_committed(saved, tmp_path):
    for name in ("00005-000003", "00011-000000"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"cut")
    saved.prune(Retention(1))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert names == ["00010-000000", "00011-000000"]  # the last may be the one that is being written


def test_what_killed_saves_left_is_removed(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "00011-000000").mkdir()
    (folder / "00011-000000" / "model.safetensors").write_bytes(b"cut")
    (folder / f"base.safetensors.{'0' * 32}.tmp").write_bytes(b"cut")
    saved.set_aside("00001-000000")
    saved.remove_unfinished()
    assert sorted(path.name for path in folder.iterdir()) == [
        *("00001-000000.damaged", "00002-000000", "00010-000000", "base.safetensors")
    ]


def test_nothing_saved(tmp_path):
    assert Checkpoints(Storage(tmp_path)).newest() == (None, {})


def test_in_phase_lora_a_checkpoint_costs_what_trains(tmp_path):
    """At most 1.3 times the bytes of trainable parameters and AdamW's two moments; the frozen base is stored once."""
    settings = parse_settings(
        {
            "name": "size",
            "storage": str(tmp_path),
            "data": {"path": str(tmp_path), "batch_size": 8, "cell": 4},
            "model": {"name": "vit_tiny_patch16_224", "image_size": 32, "options": {"patch_size": 8, "depth": 4}},
            "train": {"epochs": 9, "ramp_epochs": 0},
        }
    )
    state = TrainState(settings, 10, 1, torch.device("cpu"), 1)
    state.enter(Phase.LORA, {target.name: 8 for target in state.targets})
    state.model(torch.randn(2, 3, 32, 32)).sum().backward()
    state.optimizer.step()
    checkpoints = Checkpoints(Storage(tmp_path))
    base_files = set()
    for epoch in (1, 2):
        state.epoch = epoch
        checkpoints.save(state.snapshot([], holds_base=checkpoints.holds_base))
        base_files.add((tmp_path / "checkpoints" / "base.safetensors").stat().st_ino)  # changes if it is written anew
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / "checkpoints" / name).rglob("*") if path.is_file())
        for name in checkpoints.names()
    ]
    trained = sum(4 * parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
    assert 3 * trained < sizes[1] <= 1.3 * 3 * trained
    assert sizes[0] == pytest.approx(sizes[1], abs=10)
    assert (tmp_path / "checkpoints" / "base.safetensors").stat().st_size > 4 * 4 * 12 * 192**2 * 0.99
    assert len(base_files) == 1
    later = Checkpoints(Storage(tmp_path))
    assert not later.holds_base
    later.load(checkpoints.names()[-1])
    assert later.holds_base  # a resumed run does not write it either
