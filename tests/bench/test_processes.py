"""What processes use, against what they are known to do."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time

import pytest

from prelora_ray.bench.processes import available_memory, cpu_seconds, usages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts it")
IDLE = [sys.executable, "-c", "print('begun', flush=True); input()"]


def test_a_process_and_those_that_descend_from_it():
    with subprocess.Popen(IDLE, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        found = usages(os.getpid())
        assert usages(child.pid).keys() == {child.pid}
        child.stdin.close()
    assert found[child.pid].parent == os.getpid()
    assert found[child.pid].command == " ".join(IDLE)
    assert 2**20 < found[child.pid].memory < available_memory()
    assert found[os.getpid()].files >= len(os.listdir("/proc/self/fd")) - 1
    assert os.getpid() not in usages(child.pid)


def test_cpu_seconds_are_those_of_the_system():
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    usage = resource.getrusage(resource.RUSAGE_SELF)
    assert cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.01)
    assert cpu_seconds(os.getpid()) == pytest.approx(usage.ru_utime + usage.ru_stime, abs=0.05)
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_seconds(2**22 + 1)  # beyond the largest process number


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_bytes_and_packets_of_each_end_of_a_connection(family):
    host = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}[family]
    with socket.create_server((host, 0), family=family) as server:
        sender = socket.create_connection(server.getsockname()[:2])
        receiver, _ = server.accept()
    with sender, receiver:
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before = counted(sender, receiver)
        for _ in range(10):
            sender.sendall(b"x" * 1000)
            received = b""
            while len(received) < 1000:
                received += receiver.recv(1000)
        after = counted(sender, receiver)
    grown = [tuple(now - then for now, then in zip(end, begin, strict=True)) for end, begin in zip(after, before, strict=True)]
    assert grown == [(10, 10_000), (10, 10_000)]


def counted(*ends: socket.socket) -> list[tuple[int, int]]:
    time.sleep(0.1)  # until all is acknowledged
    sockets = usages(os.getpid())[os.getpid()].sockets
    return [sockets[os.fstat(end.fileno()).st_ino] for end in ends]
