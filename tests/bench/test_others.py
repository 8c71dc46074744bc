"""The benchmarks beside `phases`, small, as a user calls them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.fault_tolerance.async_checkpointer import AsyncCheckpointer
from tests.command import COMMAND, ROOT, prelora, prelora_here

CHECKPOINT = ("checkpoint", "--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch", "2")


def measured(*arguments: str) -> dict[str, dict[str, Any]]:
    """Rows by name."""
    done = prelora("bench", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.mark.slow
def test_data_takes_every_way(tmp_path: Path):
    out = tmp_path / "data.json"
    rows = measured("data", "--images", "100", "--batch", "16", "--cores", "1", "--out", str(out))
    base = rows["torch DataLoader, torchvision on Pillow"]["images_per_second_and_core"]
    assert len(rows) == 4
    for row in rows.values():
        assert row["against_the_data_loader"] == pytest.approx(row["images_per_second_and_core"] / base)
    assert {row["name"] for row in json.loads(out.read_text())["rows"]} == set(rows)


@pytest.mark.slow
def test_reading_counts_the_requests_of_a_row_group():
    rows = measured("reading", "--images", "620", "--latency", "5", "--requests-per-second", "60", "--workers", "2")
    shared = rows.pop("a bucket, 5 ms a request, one of 2 workers")
    disk, *buckets = rows.values()
    assert disk["requests_per_row_group"] == 0
    assert shared["requests_per_row_group"] > buckets[0]["requests_per_row_group"]  # both open files of their own
    for row in buckets:  # 9 row groups of 31 in each of 2 files and 4 in the last, and 2 for each file
        assert row["requests_per_row_group"] == pytest.approx((22 + 2 * 3) / 22)
    assert buckets[-1]["refused_per_row_group"] > 0


@pytest.mark.slow
def test_records_are_written_in_bytes_that_grow_with_the_epochs():
    rows = measured("records", "--epochs", "100", "--epochs", "200")
    written = {name: row["written_bytes"] for name, row in rows.items()}
    assert written["segments, 200 epochs"] < 2.5 * written["segments, 100 epochs"]
    assert written["whole files, 200 epochs"] > 3.5 * written["whole files, 100 epochs"]
    assert rows["segments, 200 epochs"]["recorded_bytes"] == rows["whole files, 200 epochs"]["recorded_bytes"]


@pytest.mark.slow
def test_loop_compares_the_same_steps():
    rows = measured("loop", "--image-size", "32", "--epochs", "3")
    bare, under_ray = rows.values()
    assert under_ray["against_the_bare_loop"] == pytest.approx(under_ray["images_per_second"] / bare["images_per_second"])
    assert 0 <= under_ray["waits_for_data"] < 1


@pytest.mark.slow
def test_restart_tells_both_starts():
    rows = measured("restart", "--image-size", "32")
    assert list(rows) == ["empty compile cache", "filled compile cache"]
    assert all(1 < row["seconds_to_the_first_step"] < 120 for row in rows.values())


@pytest.mark.slow
def test_checkpoint_tells_what_it_holds_up():
    rows = measured(*CHECKPOINT)
    assert len(rows) == 4
    assert rows["snapshot, which holds up the loop"]["most_ms"] < rows["until the commit"]["most_ms"]


@pytest.mark.slow
def test_a_checkpoint_that_finds_no_room_is_told_in_one_sentence(disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    done = prelora_here("bench", *CHECKPOINT)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"prelora: a checkpoint could not be written to {disk.path}/\w+: OSError: .*No space left.*\n", done.stderr
    )


def test_a_gpu_that_is_too_small_for_a_checkpoint_is_told_in_one_sentence(monkeypatch):
    def snapshot(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainState, "snapshot", snapshot)
    done = prelora_here("bench", *CHECKPOINT)
    assert done.returncode == 1
    assert done.stderr == (
        "prelora: the GPU has no room for 2 images of vit_tiny_patch16_224 beside a checkpoint's snapshot: take fewer, with "
        "--batch\n"
    )


@pytest.mark.slow
def test_a_save_that_is_done_before_the_next_step_slows_none(monkeypatch):
    start = AsyncCheckpointer.start

    def start_and_wait(checkpointer: AsyncCheckpointer, take: Callable[[], Snapshot]) -> None:
        start(checkpointer, take)
        checkpointer.wait()

    monkeypatch.setattr(AsyncCheckpointer, "start", start_and_wait)
    done = prelora_here("bench", *CHECKPOINT, "--json")
    rows = {row["name"]: row["most_ms"] for row in json.loads(done.stdout)["rows"]}
    assert rows["slowest step while it is written, beyond a usual one"] == 0


@pytest.mark.slow
def test_prepare_is_measured_against_a_pool():
    rows = measured("prepare", "--images", "32")
    assert set(rows) == {"prepare", "pool"}
    for row in rows.values():
        ratio = row["images_per_second_and_core"] / rows["pool"]["images_per_second_and_core"]
        assert row["against_the_pool"] == pytest.approx(ratio)


@pytest.mark.slow
def test_exporter_is_sent_to_and_scraped():
    rows = measured("exporter", "--workers", "3", "--seconds", "2")
    assert 0 < rows["message"]["median_ms"] <= rows["message"]["most_ms"]
    assert 0 < rows["scrape"]["median_ms"] <= rows["scrape"]["most_ms"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["phases", "--model", "vit_tinny"], "model.name = 'vit_tinny' is not allowed"),
        (["phases", "--image-size", "15"], "is not allowed with image_size 15 and options {}: phase full fails"),
        (["phases", "--batch", "0"], "Invalid value for '--batch'"),
        (["phases", "--row", "timm", "--row", "bf16"], "--row 'bf16' is not allowed: no row's name begins so; there are timm"),
        (["phases", "--row", "prelora bf16 uniform"], "prelora bf16 last half lora; prelora fp8 last half lora\n"),
        (["network", "--row", "full, 100"], "--row 'full, 100' is not allowed: no row's name begins so; there are full; full"),
        (["checkpoint", "--image-size", "15"], "is not allowed with image_size 15 and options {}: phase full fails"),
        (["phases", "--out", "/nowhere/phases.json"], "--out /nowhere/phases.json is not allowed: /nowhere is no folder"),
        (["data", "--images", "100"], "--batch 64 is not allowed with --images 100: a pass needs four batches"),
        (["loop", "--batch", "100"], "data.batch_size = 100 is not allowed: it must be a multiple of data.cell = 8"),
        (["network", "--model", "vit_tinny"], "model.name = 'vit_tinny' is not allowed"),
        (["network", "--workers", "1"], "Invalid value for '--workers'"),
        (["network", "--picture", "/nowhere/n.html"], "--picture /nowhere/n.html is not allowed: /nowhere is no folder"),
        (["restart", "--model", "vit_tinny"], "model.name = 'vit_tinny' is not allowed"),
    ],
)
def test_a_wrong_request_gets_one_sentence(arguments: list[str], sentence: str):
    done = prelora_here("bench", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("phases", "--image-size", "32", "--batch", "2", "--row", "prelora bf16"),
        ("network", "--image-size", "16", "--batch", "1", "--seconds", "0", "--bandwidth", "0.02", "--row", "full"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_was_measured_before_ctrl_c_stands(tmp_path: Path, arguments: tuple[str, ...]):
    """As from a terminal, which sends it to all processes of the command."""
    out = tmp_path / "out.json"
    command = [*COMMAND, "bench", *arguments, "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if " full" in line or "no limit" in line).partition(":")[0]
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("prelora: the benchmark ended before its last row: interrupted\n")
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == [first]
