"""One driver to a run folder, whatever happened to the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prelora_ray.fault_tolerance import lock
from prelora_ray.fault_tolerance.lock import DriverLock, HeldRunError, LostRunError, claims, holder
from prelora_ray.run_folder import RunFolder

STARTERS, ROUNDS = 8, 10
HOLDER = """
import socket, sys, time
from prelora_ray.run_folder import RunFolder
from prelora_ray.fault_tolerance import lock

folder, host, clock = sys.argv[1:]
lock.BEAT_SECONDS = 0.1
now = time.time
time.time = lambda: now() + float(clock)
if host:
    socket.gethostname = lambda: host
try:
    with lock.DriverLock(RunFolder(folder)):
        print("in", flush=True)
        sys.stdin.read()
except lock.LostRunError as error:
    print(error, flush=True)
"""
ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid_namespace": "pid:[1]", "pid": 7, "started": 1, "since": 0.0}

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def hold(folder) -> Iterator[Hold]:
    """Starts a process that holds the folder, to the end of the test."""
    processes = []

    def start(host: str = "", clock: float = 0.0, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-c", HOLDER, str(folder), host, str(clock)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout and process.stdout.readline() == "in\n"
        return process

    yield start
    for process in processes:
        process.communicate()  # ends with its standard input


def refused(folder: RunFolder) -> str:
    with pytest.raises(HeldRunError) as caught, DriverLock(folder):
        pass
    return str(caught.value)


class SlowFolder(RunFolder):
    """A folder whose writes last, so that those that start at once meet."""

    def write_bytes(self, name: str, content: bytes) -> None:
        super().write_bytes(name, content)
        time.sleep(0.05)


def compete(folders: list[RunFolder], barrier: Any, got_in: Any) -> None:
    for n, folder in enumerate(folders):
        barrier.wait(60)
        try:
            with DriverLock(folder, silence_seconds=0.3):
                got_in.put(n)
                barrier.wait(60)
        except HeldRunError:
            barrier.wait(60)


@pytest.mark.parametrize("left_behind", ["silent", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (None, "dead"))])
def test_of_many_that_start_at_once_one_gets_in(tmp_path, left_behind):
    """Also where all see that the driver before them has died, or hear nothing of it."""
    folders = [SlowFolder(tmp_path / str(n)) for n in range(ROUNDS)]
    dead = {**lock._this_process(), "started": 1}
    for folder in folders:
        if left_behind is not None:
            folder.write_json("driver-before.json", {"dead": dead, "silent": ELSEWHERE}[left_behind] | {"holds": True})
    context = multiprocessing.get_context("fork")  # they import nothing anew, so that they start together
    barrier, got_in = context.Barrier(STARTERS), context.SimpleQueue()
    starters = [context.Process(target=compete, args=(folders, barrier, got_in), daemon=True) for _ in range(STARTERS)]
    for process in starters:
        process.start()
    for process in starters:
        process.join()
    assert [process.exitcode for process in starters] == [0] * STARTERS
    counts = Counter()
    while not got_in.empty():
        counts[got_in.get()] += 1
    assert counts == dict.fromkeys(range(ROUNDS), 1)
    assert all(claims(folder) == {} for folder in folders)


def test_the_second_driver_is_refused_with_the_first_ones_host_and_pid(folder, hold):
    first = hold()
    os.kill(first.pid, signal.SIGSTOP)  # it is there, so its heartbeat may be as old as it likes
    try:
        assert f"is being trained by process {first.pid} on {socket.gethostname()}: wait for it" in refused(folder)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert [claim["pid"] for claim in claims(folder).values()] == [first.pid]


@pytest.mark.parametrize("clock", [pytest.param(-3600.0, marks=pytest.mark.slow), 3600.0])
def test_another_machines_driver_holds_whatever_its_clock_says(folder, hold, clock):
    first = hold("elsewhere", clock)
    assert abs(holder(folder)["time"] - time.time() - clock) < 60
    assert f"process {first.pid} on elsewhere" in refused(folder)


@pytest.mark.parametrize("proc", ["--mount-proc", pytest.param(None, marks=pytest.mark.slow)])
def test_a_driver_in_another_pid_namespace_holds(folder, hold, proc):
    """Also where /proc tells it of another namespace's processes, and so not of itself."""
    prefix = ("unshare", "--pid", "--fork", "--kill-child", *([proc] if proc else []))
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("not allowed to make a PID namespace")
    hold(prefix=prefix)
    claim = holder(folder)
    assert claim["host"] == socket.gethostname()
    assert (claim["pid_namespace"] is not None) == bool(proc)
    assert "process 1 on" in refused(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_zombie", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_driver_that_was_killed_here_is_not_waited_for(folder, hold, is_zombie):
    first = hold()
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    if not is_zombie:
        first.wait()
    with DriverLock(folder, silence_seconds=3600):
        assert [claim["pid"] for claim in claims(folder).values()] == [os.getpid()]
    assert claims(folder) == {}


@pytest.mark.timeout(60)
def test_a_process_number_that_another_process_has_by_now_holds_nothing(folder):
    folder.write_json("driver-before.json", {**lock._this_process(), "started": 1})
    with DriverLock(folder, silence_seconds=3600):
        pass


@pytest.mark.parametrize("content", [{**ELSEWHERE, "holds": True}, {**ELSEWHERE, "time": 0.0}, ["damaged"]])
def test_what_shows_no_sign_of_life_holds_for_a_while(folder, content):
    """Also what an earlier version wrote, and what is damaged."""
    folder.write_json("driver.json", content)
    with DriverLock(folder, silence_seconds=0.5):
        assert [claim["pid"] for claim in claims(folder).values()] == [os.getpid()]


class FastClock:
    """Ten seconds of it pass in one."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic() * 10

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 10)


def test_a_silence_of_six_seconds_is_not_death(folder, monkeypatch):
    monkeypatch.setattr(lock, "time", FastClock())
    refusals = []
    folder.write_json("driver-first.json", {**ELSEWHERE, "holds": True, "beats": 1})
    starter = threading.Thread(target=lambda: refusals.append(refused(folder)))
    starter.start()
    starter.join(0.7)
    assert starter.is_alive()
    assert "driver-first.json" in claims(folder)
    folder.write_json("driver-first.json", {**ELSEWHERE, "holds": True, "beats": 2})
    starter.join()
    assert "process 7 on elsewhere" in refusals[0]
    assert list(claims(folder)) == ["driver-first.json"]


def test_a_driver_that_was_taken_over_stops(folder, hold):
    """It was suspended for longer than the other one listened."""
    first = hold("elsewhere")
    os.kill(first.pid, signal.SIGSTOP)
    with DriverLock(folder, silence_seconds=0.5) as second:
        os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.5)  # some heartbeats of the first one's
        second.check()
        told = first.communicate()[0]
        second.check()
    assert told.startswith(f"another driver, process {os.getpid()} on {socket.gethostname()}, has taken over run {folder}")


def test_of_two_that_hold_neither_goes_on(folder, monkeypatch):
    """As where one was suspended inside a heartbeat, and brought its claim back by it."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)

    def meet() -> None:
        with DriverLock(folder) as held:
            folder.write_json("driver-other.json", {**ELSEWHERE, "holds": True})
            deadline = time.monotonic() + 10
            while held._name in claims(folder):
                assert time.monotonic() < deadline

    with pytest.raises(LostRunError, match="another driver, process 7 on elsewhere, has taken over"):
        meet()
    assert list(claims(folder)) == ["driver-other.json"]


def test_in_a_bucket_one_of_two_gets_in(bucket):
    for n in range(3):
        folder = RunFolder(f"{bucket}/lock/{n}")
        barrier, told = threading.Barrier(2), []

        def start(folder=folder, barrier=barrier, told=told) -> None:
            barrier.wait(60)
            try:
                with DriverLock(folder):
                    told.append("in")
                    barrier.wait(60)
            except HeldRunError:
                told.append("refused")
                barrier.wait(60)

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told) == ["in", "refused"]
        assert claims(folder) == {}


def test_the_heart_beats(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with DriverLock(folder):
        first = holder(folder)
        deadline = time.monotonic() + 10
        while holder(folder)["beats"] == first["beats"]:
            assert time.monotonic() < deadline
        assert holder(folder)["since"] == first["since"]
