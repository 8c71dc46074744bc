"""A worker that hangs ends itself, and one that is merely slow does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

WATCHED = """
import time
from prelora_ray.fault_tolerance.watchdog import Watchdog
dog = Watchdog(0.5)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED + textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_hang_ends_the_process_and_says_where():
    ended = run("""
        def collective():
            time.sleep(50)
        dog.beat()
        collective()
    """)
    assert ended.returncode == 1
    assert "no progress for 0.5 s" in ended.stderr
    assert "in collective" in ended.stderr


def test_beats_keep_it_alive_and_a_start_may_take_longer():
    ended = run("""
        time.sleep(1.5)  # the start, patiently
        for _ in range(15):
            dog.beat()
            time.sleep(0.1)
        dog.beat(patiently=True)
        time.sleep(1.5)
        dog.end()
        dog.beat()
        time.sleep(1.5)
        print("done")
    """)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
