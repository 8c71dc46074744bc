"""One driver to a run folder, whatever became of the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from prelora_ray.run_folder import RunFolder
from prelora_ray.train import lock
from prelora_ray.train.lock import FILE, DriverLock


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def other():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def content(pid: int, host: str | None = None, age: float = 0.0, started: float | None = None) -> dict:
    if started is None:
        started = psutil.Process(pid).create_time()
    return {"host": host or socket.gethostname(), "pid": pid, "started": started, "since": 0.0, "time": time.time() - age}


def test_the_second_driver_is_refused_with_the_first_ones_host_and_pid(folder, other):
    folder.write_json(FILE, content(other.pid, age=1000.0))  # it runs, so its heartbeat may be as old as it likes
    with pytest.raises(ValueError, match=rf"trained by process {other.pid} on {socket.gethostname()}"), DriverLock(folder):
        pass
    assert folder.read_json(FILE)["pid"] == other.pid


def test_a_driver_that_died_here_holds_nothing(folder, other):
    entry = content(other.pid)
    other.kill()
    other.wait()
    folder.write_json(FILE, entry)
    with DriverLock(folder):
        assert folder.read_json(FILE)["pid"] == os.getpid()
    assert not folder.exists(FILE)


def test_a_process_number_that_another_process_has_now_holds_nothing(folder, other):
    folder.write_json(FILE, content(other.pid, started=0.0))
    with DriverLock(folder):
        pass


@pytest.mark.parametrize(("age", "is_held"), [(5.0, True), (120.0, False)])
def test_another_machines_driver_holds_as_long_as_its_heart_beats(folder, age, is_held):
    folder.write_json(FILE, content(1, host="elsewhere", age=age, started=0.0))
    if is_held:
        with pytest.raises(ValueError, match="process 1 on elsewhere"), DriverLock(folder):
            pass
    else:
        with DriverLock(folder):
            pass


def test_a_damaged_lock_holds_nothing(folder):
    folder.write_bytes(FILE, b'{"host": "some')
    with DriverLock(folder):
        assert json.loads(folder.read_bytes(FILE))["pid"] == os.getpid()


def test_the_heart_beats(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with DriverLock(folder):
        first = folder.read_json(FILE)
        deadline = time.monotonic() + 10
        while folder.read_json(FILE)["time"] == first["time"]:
            assert time.monotonic() < deadline
        assert folder.read_json(FILE)["since"] == first["since"]
