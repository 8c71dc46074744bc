"""What the model sees, through Ray Data, does not depend on the number of workers or on where a run resumes."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch, Pass
from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.mixing import mix, normalize, plan_mixing, soft_targets
from prelora_ray.data.stream import stream_batches
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan

PASSES = [Pass("train", 0), Pass("val", 0), Pass("train", 1), Pass("train", 2), Pass("val", 2)]
Cells = dict[tuple[str, int, int, int], tuple[bytes, ...]]


@pytest.fixture(scope="module")
def settings(digits: Path) -> Settings:
    return parse_settings(
        {
            "name": "stream",
            "data": {"path": str(digits), "batch_size": 240, "cell": 24, "crop_ratio": 1.0},
            "model": {"image_size": 8},
            "augment": {"crop": "padded", "padding": 2, "mixup": 0.8, "cutmix": 1.0, "erase": 0.5, "label_smoothing": 0.1},
        }
    )


def seen_cells(settings: Settings, rank: int, world_size: int, passes: list[Pass] = PASSES) -> Cells:
    """Ids, augmented pixels and mixed batch of every cell that a worker serves, by (split, epoch, batch, cell)."""
    plan = stream_plan(settings, read_manifest(Storage(settings.data.path)), rank, world_size)
    augment, cell = settings.augment, settings.data.cell
    cells: Cells = {}
    for batch in stream_batches(plan, passes, decoders=1):
        assert len(batch.ids) == plan.num_slots
        assert (batch.tensors["labels"][batch.ids < 0] == -1).all()
        drawn = plan_mixing(augment, 0, batch.epoch, batch.batch, plan.cells, cell, batch.ids, batch.tensors["images"].shape[1])
        images = normalize(batch.tensors["images"], settings.data.mean, settings.data.std)
        mixed, targets = mix(images, soft_targets(batch.tensors["labels"], 10, augment.label_smoothing, images.dtype), drawn)
        for i, number in enumerate(plan.cells):
            part = slice(i * cell, (i + 1) * cell)
            content = (
                batch.ids[part],
                batch.tensors["images"][part],
                batch.tensors["labels"][part],
                mixed[part],
                targets[part],
            )
            cells[batch.split, batch.epoch, batch.batch, number] = tuple(np.asarray(x).tobytes() for x in content)
    return cells


@pytest.fixture(scope="module")
def one_worker(settings: Settings, ray_cluster: None) -> Cells:
    return seen_cells(settings, 0, 1)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_same_samples_pixels_and_mixed_batches_for_any_number_of_workers(settings, one_worker, world_size):
    together: Cells = {}
    for rank in range(world_size):
        cells = seen_cells(settings, rank, world_size)
        assert not together.keys() & cells.keys()
        together |= cells
    assert together == one_worker


def test_every_image_once_an_epoch_and_validation_where_it_is_due(settings, one_worker):
    manifest = read_manifest(Storage(settings.data.path))
    for split, epochs in (("train", (0, 1, 2)), ("val", (0, 2))):
        assert {key[1] for key in one_worker if key[0] == split} == set(epochs)
        for epoch in epochs:
            ids = [
                i
                for key, content in one_worker.items()
                if key[:2] == (split, epoch)
                for i in np.frombuffer(content[0], np.int64)
                if i >= 0
            ]
            assert sorted(ids) == list(range(manifest.num_images(split)))


def test_resuming_in_the_middle_of_an_epoch_gives_the_rest(settings, one_worker):
    rest = {key: content for key, content in one_worker.items() if key[1] == 2 or (key[1] == 1 and key[2] >= 4)}
    assert seen_cells(settings, 0, 1, [Pass("train", 1, 4), *PASSES[3:]]) == rest


@pytest.fixture(scope="module")
def growing(settings: Settings) -> Settings:
    """Epochs 0 and 1 at 4 pixels, epoch 2 at 6 with RandAugment, as validation and all behind at 8."""
    steps = [{"until": 2, "image_size": 4}, {"until": 0.25, "image_size": 6, "policy": "rand-m5-inc1"}]
    content = settings.model_dump(mode="json")
    return parse_settings({**content, "train": {**content["train"], "epochs": 12, "resolution": steps}})


GROWING_PASSES = [Pass("train", 0), Pass("train", 1), Pass("val", 1), Pass("train", 2), Pass("train", 3), Pass("val", 3)]


@pytest.fixture(scope="module")
def grown(growing: Settings, ray_cluster: None) -> Cells:
    return seen_cells(growing, 0, 1, GROWING_PASSES)


@pytest.mark.parametrize(
    ("places", "size", "padding", "policy"),
    [
        pytest.param([("train", 0), ("train", 1)], 4, 1, None, marks=pytest.mark.slow),
        pytest.param([("train", 2)], 6, 2, "rand-m5-inc1", marks=pytest.mark.slow),
        pytest.param([("val", 1), ("train", 3), ("val", 3)], 8, 2, None, marks=pytest.mark.slow),
    ],
    ids=["4", "6", "8"],
)
def test_images_that_grow_are_those_of_a_run_of_their_size(settings, grown, places, size, padding, policy):
    model, augment = settings.model, settings.augment
    alone = settings.model_copy(
        update={
            "model": model.model_copy(update={"image_size": size}),
            "augment": augment.model_copy(update={"policy": policy, "padding": padding}),
        }
    )
    expected = seen_cells(alone, 0, 1, [Pass(*place) for place in places])
    assert {key: content for key, content in grown.items() if key[:2] in places} == expected


def test_images_grow_alike_on_any_number_of_workers_and_behind_a_resume(growing, grown):
    together: Cells = {}
    for rank in range(3):
        together |= seen_cells(growing, rank, 3, GROWING_PASSES)
    assert together == grown
    rest = {key: content for key, content in grown.items() if key[1:3] >= (1, 4) or key[:2] == ("val", 1)}
    assert seen_cells(growing, 0, 1, [Pass("train", 1, 4), *GROWING_PASSES[2:]]) == rest


def test_pixels_are_those_of_the_source(settings, one_worker):
    """Validation images against scikit-learn's own arrays, found by their recorded source."""
    import pyarrow.parquet as pq
    from sklearn.datasets import load_digits

    manifest = read_manifest(Storage(settings.data.path))
    rows = [r for s in manifest.splits["val"] for r in pq.read_table(Path(settings.data.path, s.file)).to_pylist()]
    digits = load_digits()
    for key, content in one_worker.items():
        if key[:2] == ("val", 0):
            ids, pixels = np.frombuffer(content[0], np.int64), np.frombuffer(content[1], np.uint8).reshape(-1, 8, 8, 3)
            labels = np.frombuffer(content[2], np.int64)
            for i in np.flatnonzero(ids >= 0):
                number = int(rows[ids[i]]["source"])
                expected = (digits.images[number] * 255 / 16).round()
                assert (pixels[i] == expected[:, :, None]).all()
                assert labels[i] == digits.target[number]


def test_batches_arrive_in_order(settings, ray_cluster):
    plan = stream_plan(settings, read_manifest(Storage(settings.data.path)), 0, 1)
    batches: list[Batch] = list(stream_batches(plan, PASSES, decoders=2))
    expected = [(split, epoch, batch) for split, epoch, _ in PASSES for batch in range(plan.orders[split].num_batches)]
    assert [(b.split, b.epoch, b.batch) for b in batches] == expected


def test_a_reader_does_not_run_ahead_of_a_loop_that_waits(settings, ray_cluster, tmp_path, monkeypatch):
    """While a step compiles nobody takes batches, and a run's images must not pile up meanwhile."""
    monkeypatch.setattr("prelora_ray.data.stream._LEAST_STORE_BYTES", 0)
    path = shutil.copytree(settings.data.path, tmp_path / "digits")
    plan = replace(stream_plan(settings, read_manifest(Storage(str(path))), 0, 1), path=str(path))
    passes = [Pass("train", epoch) for epoch in range(200)]
    batches = stream_batches(plan, passes, decoders=2)
    next(batches)
    time.sleep(6)
    for file in path.glob("*.parquet"):
        os.truncate(file, 0)
    read_ahead = []
    with pytest.raises(Exception, match=r"(?i)parquet"):
        read_ahead.extend(batch.epoch for batch in batches)
    assert 4 < max(read_ahead) < 60
