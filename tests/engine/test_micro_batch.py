"""Which sizes are tried, and, on a GPU, that a phase takes the largest that fits in what memory it may have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch
from prelora_ray.data.manifest import Manifest, Shard
from prelora_ray.engine.micro_batch import MemoryShortageError, bytes_to_spare, micro_batch_sizes
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.method.phases import Phase
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.batch_stream import stream_plan
from prelora_ray.train.found_sizes import FILE, read_found, write_found
from tests.runs import TINY_VIT


@pytest.mark.parametrize(
    ("num_slots", "cell", "expected"),
    [(256, 32, [256, 128, 96, 64, 32]), (96, 32, [96, 64, 32]), (8, 8, [8]), (12, 1, [12, 6, 4, 3, 2, 1])],
)
def test_sizes_are_whole_cells_that_split_the_share_ever_finer(num_slots, cell, expected):
    assert micro_batch_sizes(num_slots, cell) == expected


def test_what_was_found_is_found_again_on_the_same_gpu_alone(tmp_path):
    folder = RunFolder(tmp_path)
    found = {(Phase.FULL, 160): 96, (Phase.FULL, 224): 64, (Phase.LORA, 224): 96}
    write_found(folder, "H100", found)
    assert read_found(folder, "H100") == found
    assert read_found(folder, "A100") == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        b"[]",
        b"{}",
        b'{"device": "H100", "none at 8": 3}',
        b'{"device": "H100", "full at 8": null}',
        b'{"device": "H100", "full": 3}',
    ],
)
def test_a_damaged_record_has_it_searched_again(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    assert read_found(RunFolder(tmp_path), "H100") == {}


def test_a_step_leaves_room_for_a_snapshot_in_every_phase(tmp_path):
    """As many bytes as a snapshot really has, known before the first step; and room for moments until they exist."""
    settings = parse_settings(
        {
            "name": "x",
            "data": {"path": "x", "batch_size": 8, "cell": 4},
            "model": {"name": "vit_tiny_patch16_224", "image_size": 8, "options": TINY_VIT},
            "method": {"r_max": 8},
            "train": {"epochs": 9, "ramp_epochs": 0},
        }
    )
    state = TrainState(settings, 10, 1, torch.device("cpu"), 1)
    ranks = {target.name: 2 for target in state.targets}
    for phase in Phase:
        state.enter(phase, ranks)
        state.optimizer.state.clear()
        expected, before = state.snapshot_bytes(), bytes_to_spare(state, 10**9)
        state.model(torch.randn(2, 3, 8, 8)).sum().backward()
        state.optimizer.step()
        content = state.snapshot([], holds_base=False)
        moments = [tensor for entry in content.optimizer.values() for tensor in entry.values()]
        tensors = [*content.model.values(), *content.base.values(), *content.adapter.values(), *moments]
        assert expected == sum(tensor.nbytes for tensor in tensors)
        assert bytes_to_spare(state, 10**9) == 4 * 10**7 + expected
        assert before == 4 * 10**7 + expected + sum(tensor.nbytes for tensor in moments)


def test_what_was_found_is_for_a_phase_and_a_size_of_images():
    settings = parse_settings(
        {
            "name": "x",
            "data": {"path": "x", "batch_size": 64, "cell": 4},
            "model": {"name": "vit_tiny_patch16_224", "image_size": 8, "options": TINY_VIT},
            "method": {"r_max": 8},
            "train": {
                **{"epochs": 20, "ramp_epochs": 0, "micro_batch": "auto"},
                "resolution": [{"until": 2, "image_size": 4}],
            },
        }
    )
    shard = Shard("x", (64,), 0, "")
    manifest = Manifest(tuple("0123456789"), {"train": (shard,), "val": (shard,)}, 0, {})
    state = TrainState(settings, 10, 1, torch.device("cpu"), 1)
    step = TrainStep(state, stream_plan(settings, manifest, 0, 1))
    step.found_sizes = {(Phase.FULL, 4): 32, (Phase.FULL, 8): 16, (Phase.WARMUP, 8): 8}
    taken = []
    for state.epoch in range(4):
        if state.epoch == 3:
            state.enter(Phase.WARMUP, {target.name: 2 for target in state.targets})
        taken.append(step.micro_batch)
    assert taken == [32, 32, 16, 8]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU takes the whole share: there is nothing to search")
def test_the_largest_that_fits_is_found_and_changes_no_gradient():
    def train_step(micro_batch: object) -> TrainStep:
        settings = parse_settings(
            {
                "name": "x",
                "data": {"path": "x", "batch_size": 256, "cell": 8},
                "model": {"name": "vit_small_patch16_224"},
                "train": {"micro_batch": micro_batch, "precision": "fp32", "compile": False, "clip_norm": None},
            }
        )
        shard = Shard("x", (256,), 0, "")
        manifest = Manifest(tuple("0123456789"), {"train": (shard,), "val": (shard,)}, 0, {})
        state = TrainState(settings, 10, 100, torch.device("cuda"), 1)
        return TrainStep(state, stream_plan(settings, manifest, 0, 1))

    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (256, 224, 224, 3), np.uint8))
    tensors = {"images": images, "labels": torch.from_numpy(rng.integers(0, 10, 256))}
    batch = Batch("train", 0, 0, tensors, np.arange(256))
    total = torch.cuda.get_device_properties(0).total_memory
    limit = 10 * 2**30
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        found = train_step("auto")
        assert found.wants_search
        found.search(batch)
        size = found.found_sizes[Phase.FULL, 224]
        assert size < 256 and size in micro_batch_sizes(256, 8)
        assert not found.wants_search
        found.train(batch)
        another = train_step("auto")
        torch.cuda.set_per_process_memory_fraction(2**31 / total)  # less than what is to stay free
        with pytest.raises(MemoryShortageError, match=r"data\.cell = 8 is not allowed on a GPU of"):
            another.search(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    larger = train_step(min(s for s in micro_batch_sizes(256, 8) if s > size))
    torch.cuda.reset_peak_memory_stats()
    larger.train(batch)
    assert torch.cuda.max_memory_allocated() > limit - 0.05 * total
    whole = train_step(None)
    whole.train(batch)
    for (name, one), (_, other) in zip(found.state.model.named_parameters(), whole.state.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
