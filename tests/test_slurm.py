"""jobs/slurm.sh, with commands in place of Slurm's and Ray's that write down what they are asked for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.site import wait_for

SCRIPT = Path(__file__).parent.parent / "jobs" / "slurm.sh"
RUN = """
echo run "$@" >> "$TOLD"
stop() { echo stopped >> "$TOLD"; sleep 0.5; exit 130; }
trap stop TERM
if [ "${KILLS:-}" ]; then
    until [ -s "$TOLD.head" ]; do sleep 0.05; done
    kill $(cat "$TOLD.head")
fi
if [ "${ENDS:-}" ]; then exit "$ENDS"; fi
while :; do sleep 0.05; done
"""
"""Of a run that takes half a second to commit its checkpoint."""


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a job on three nodes."""
    nodes = "".join(f" 1 node_{number}\\n" for number in range(3))
    commands = {
        "srun": 'echo srun "$@" >> "$TOLD"; [[ "$*" == *--head* ]] && echo $$ > "$TOLD.head"; exec sleep "${RAY_LIVES:-20}"',
        "ray": f"[ ${{RAY_NODES:-3}} = 3 ] && printf '{nodes}' || echo asked >> $TOLD; ${{RAY_ANSWERS:-true}}",
        "prelora": RUN,
    }
    for name, body in (commands | {"scontrol": 'echo scontrol "$@" >> "$TOLD"'}).items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    of_slurm = {"SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_ON_NODE": "16", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
    return {**os.environ, **of_slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")}


@pytest.fixture
def start() -> Iterator[Start]:
    jobs: list[subprocess.Popen[bytes]] = []

    def begin(environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
        command = [SCRIPT, "recipe.yaml", *arguments]
        jobs.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))
        return jobs[-1]

    yield begin
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def told(environment: dict[str, str]) -> list[str]:
    path = Path(environment["TOLD"])
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("told_by", "goes_on"), [(signal.SIGUSR1, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)]
)
def test_a_signal_stops_the_run_and_the_end_of_its_time_brings_it_back(environment, start, told_by, goes_on):
    job = start(environment, "--set", "a=b c")
    wait_for(lambda: "run train recipe.yaml --set a=b c" in told(environment), 20, "the run")
    job.send_signal(told_by)
    assert job.wait(20) == 130
    lines = told(environment)
    assert "stopped" in lines
    assert [line for line in lines if line.startswith("scontrol")] == (["scontrol requeue 7"] if goes_on else [])
    head, others = sorted((line for line in lines if line.startswith("srun")), key=lambda line: "--head" not in line)
    assert "--nodelist=n1" in head and "--num-cpus=16" in head
    assert "--nodes=2 --ntasks=2 --exclude=n1" in others


def test_a_run_whose_ray_was_ended_comes_back(environment, start):
    """As Slurm ends it where another job takes the nodes."""
    assert start(environment | {"ENDS": "1", "KILLS": "1"}).wait(20) == 1
    assert "scontrol requeue 7" in told(environment)


@pytest.mark.parametrize(
    ("told_by", "goes_on"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((signal.SIGUSR1, True), (signal.SIGTERM, False))),
        (None, True),
    ],
)
def test_what_happens_while_nodes_are_awaited_counts_too(environment, start, told_by, goes_on):
    """A signal, or the end of Ray."""
    job = start(environment | {"RAY_NODES": "2"})
    wait_for(lambda: told(environment).count("asked") > 2, 20, "the wait for nodes")
    if told_by is None:
        head = Path(f"{environment['TOLD']}.head")
        os.kill(wait_for(lambda: head.exists() and int(head.read_text() or 0), 20, "the head"), signal.SIGKILL)
    else:
        job.send_signal(told_by)
    assert job.wait(20) == 130
    lines = told(environment)
    assert not [line for line in lines if line.startswith("run")]
    assert ("scontrol requeue 7" in lines) == goes_on


def test_a_job_whose_ray_does_not_start_ends_for_good(environment, start):
    job = start(environment | {"RAY_LIVES": "0", "RAY_ANSWERS": "false"})
    assert job.wait(20) == 1
    assert not [line for line in told(environment) if line.startswith(("run", "scontrol"))]


@pytest.mark.parametrize("status", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_job_ends_as_its_run_does(environment, start, status):
    assert start(environment | {"ENDS": str(status)}).wait(20) == status
    assert not [line for line in told(environment) if line.startswith("scontrol")]
