from types import SimpleNamespace
from typing import Any, cast

import pytest

from prelora_ray.config_file import parse_settings
from prelora_ray.train.attempt import WorkerAttempt, _own_sums

SUMS = [[1.5, 8.0], [2.25, 12.0], [4.0, 4.0]]
"""Loss sum and images of three workers."""


def test_as_many_workers_go_on_with_their_own_sums():
    assert [_own_sums(SUMS, rank, 3) for rank in range(3)] == [(1.5, 8), (2.25, 12), (4, 4)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_another_number_of_workers_counts_every_sum_once(world_size):
    assert [_own_sums(SUMS, rank, world_size) for rank in range(world_size)] == [(7.75, 24), *[(0, 0)] * (world_size - 1)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_begins_without_sums(world_size):
    assert [_own_sums([], rank, world_size) for rank in range(world_size)] == [(0, 0)] * world_size


@pytest.mark.parametrize("compiles", [True, False])
def test_where_images_grow_the_watchdog_is_patient_and_it_is_told(compiles):
    """Their first step compiles."""
    steps = [{"until": 1, "image_size": 64}, {"until": 3, "image_size": 96}]
    settings = parse_settings({"name": "run", "data": {"path": "x"}, "train": {"resolution": steps}})
    patient: list[int] = []
    told: list[str | None] = []
    none = lambda *_: None  # noqa: E731
    attempt = cast(Any, SimpleNamespace())
    attempt.settings, attempt.plan, attempt.stream = settings, None, SimpleNamespace(wait_seconds=0.0)
    attempt.state = SimpleNamespace(batch=0, compiles=compiles, phases=SimpleNamespace(phase="full"))
    attempt.watchdog = SimpleNamespace(beat=lambda patiently: patient.append(attempt.state.epoch))
    attempt._telemetry = SimpleNamespace(begin_epoch=none)
    attempt._train_step = SimpleNamespace(begin_epoch=none, exchange_clock=SimpleNamespace(seconds=0.0))
    attempt._recorder, attempt._sums_before = SimpleNamespace(epoch_begins=none, wants_images=none), (0.0, 0.0)
    for epoch in range(5):
        attempt.state.epoch, attempt.state.image_size = epoch, settings.image_size(epoch)
        attempt._doing = None
        WorkerAttempt.begin_epoch(attempt)
        told.append(attempt._doing)
    assert patient == [1, 3]
    assert told == ([None, "compile for 96 pixels", None, "compile for 224 pixels", None] if compiles else [None] * 5)
