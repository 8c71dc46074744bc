"""When rank 0 asks for a save, a stop, or to leave."""

from __future__ import annotations

import time

import pytest
import ray

from prelora_ray.config import CheckpointSettings, WorkerSettings
from prelora_ray.fault_tolerance import notices
from prelora_ray.fault_tolerance.control import Action
from prelora_ray.fault_tolerance.notices import STOP_FILE, Notices, room_to_grow
from prelora_ray.run_folder import RunFolder


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def staying(monkeypatch) -> None:
    """All nodes stay."""
    monkeypatch.setattr(notices, "preemption", lambda: None)


@pytest.fixture
def clock(monkeypatch, staying) -> Clock:
    """A clock that the test moves."""
    clock = Clock()
    monkeypatch.setattr(notices, "time", clock)
    return clock


def test_saves_every_so_many_steps_counted_from_where_the_attempt_began(tmp_path, clock):
    watch = Notices(RunFolder(tmp_path), CheckpointSettings(every_steps=3, every_seconds=None))
    requests = []
    for step in range(101, 111):
        requests.append(watch.request(step, is_busy=False))
        if requests[-1] is Action.SAVE:
            watch.saved(step)
    assert [request.name for request in requests] == [
        "NONE",
        "NONE",
        "NONE",
        "SAVE",
        "NONE",
        "NONE",
        "SAVE",
        "NONE",
        "NONE",
        "SAVE",
    ]


def test_saves_every_so_many_seconds_but_not_while_one_is_being_written(tmp_path, clock):
    watch = Notices(RunFolder(tmp_path), CheckpointSettings(every_seconds=60.0))
    assert watch.request(1, is_busy=False) is Action.NONE
    clock.now += 60
    assert watch.request(2, is_busy=True) is Action.NONE
    assert watch.request(3, is_busy=False) is Action.SAVE
    watch.saved(4)
    clock.now += 59
    assert watch.request(5, is_busy=False) is Action.NONE


def test_the_drivers_request_is_seen_within_seconds(tmp_path, staying):
    folder = RunFolder(tmp_path)
    watch = Notices(folder, CheckpointSettings())
    assert watch.request(1, is_busy=False) is Action.NONE
    folder.write_json(STOP_FILE, {})
    end = time.monotonic() + 10
    while watch.request(2, is_busy=True) is not Action.STOP:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_bucket_that_cannot_be_reached_holds_up_no_step_and_its_request_is_seen_later(bucket, proxy, staying, monkeypatch):
    monkeypatch.setattr(notices, "_POLL_SECONDS", {True: 0.2, False: 0.0})
    folder = RunFolder(f"{bucket}/notices")
    folder.write_bytes(STOP_FILE, b"")
    with proxy.outage("silent"):
        watch = Notices(folder, CheckpointSettings())
        for step in range(1000):
            assert watch.request(step, is_busy=False) is Action.NONE
    end = time.monotonic() + 30
    while watch.request(2, is_busy=True) is not Action.STOP:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_notice_of_preemption_is_obeyed_at_once(tmp_path, clock, monkeypatch):
    watch = Notices(RunFolder(tmp_path), CheckpointSettings())
    monkeypatch.setattr(notices, "preemption", object)
    assert watch.request(1, is_busy=True) is Action.LEAVE


def test_saves_once_when_there_comes_room_to_grow(tmp_path, clock):
    room = [False, False, True, True, False, True]
    watch = Notices(RunFolder(tmp_path), CheckpointSettings(every_seconds=None), lambda: room.pop(0))
    requests = []
    for step in range(12):
        clock.now += 0.5
        requests.append(watch.request(step, is_busy=False))
    assert [step for step, request in enumerate(requests) if request is Action.SAVE] == [5, 11]


def test_room_is_that_of_one_more_worker(ray_cluster):
    free = ray.available_resources()["CPU"]
    assert room_to_grow(WorkerSettings(max=2, cpus=free), 1, uses_gpu=False)
    assert not room_to_grow(WorkerSettings(max=2, cpus=free + 1), 1, uses_gpu=False)
    assert not room_to_grow(WorkerSettings(max=2, cpus=free), 2, uses_gpu=False)
    assert not room_to_grow(WorkerSettings(max=2, cpus=free), 1, uses_gpu=True)


def test_storage_that_fails_is_asked_for_the_request_again(tmp_path, staying, monkeypatch):
    folder = RunFolder(tmp_path)
    failures = [OSError("out"), OSError("out")]

    def exists(name: str) -> bool:
        if failures:
            raise failures.pop()
        return True

    monkeypatch.setattr(folder, "exists", exists)
    watch = Notices(folder, CheckpointSettings())
    end = time.monotonic() + 10
    while watch.request(1, is_busy=False) is not Action.STOP:
        assert time.monotonic() < end
        time.sleep(0.01)
