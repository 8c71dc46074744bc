"""A worker that hangs ends itself, and one that is merely slow does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

CLOCK = """
import threading, time
from prelora_ray.fault_tolerance import watchdog

class Clock:  # one that is moved by hand
    now, looks = 0.0, threading.Semaphore(0)

    def monotonic(self):
        if threading.current_thread() is not threading.main_thread():
            self.looks.release()
        return self.now

    def move(self, seconds):  # and have the watchdog look at it
        self.now += seconds
        for _ in range(2):  # the first look may have begun before
            while self.looks.acquire(blocking=False):
                pass
            self.looks.acquire()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CLOCK + textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_hang_ends_the_process_and_says_where():
    ended = run("""
        def collective():
            time.sleep(50)
        dog = watchdog.Watchdog(0.5)
        dog.beat()
        collective()
    """)
    assert ended.returncode == 1
    assert "no progress for 0.5 s" in ended.stderr
    assert "in collective" in ended.stderr


def test_beats_keep_it_alive_and_a_start_may_take_longer():
    ended = run("""
        clock = watchdog.time = Clock()
        dog = watchdog.Watchdog(0.1)
        clock.move(0.9)  # the start, patiently
        for _ in range(15):
            dog.beat()
            clock.move(0.09)
        dog.beat(patiently=True)
        clock.move(0.9)
        dog.end()
        dog.beat()
        clock.now += 2
        time.sleep(0.2)  # in which it would look twenty times
        print("done")
    """)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
