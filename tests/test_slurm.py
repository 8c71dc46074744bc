"""jobs/slurm.sh, with commands in place of Slurm's and Ray's that write down what they are asked for."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.chaos.site import wait_for

SCRIPT = Path(__file__).parent.parent / "jobs" / "slurm.sh"
RUN = """
echo run "$@" >> "$TOLD"
stop() { echo stopped >> "$TOLD"; sleep 0.5; exit 130; }
trap stop TERM
if [ "${ENDS:-}" ]; then exit "$ENDS"; fi
while :; do sleep 0.05; done
"""
"""Of a run that takes half a second to commit its checkpoint."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a job on three nodes."""
    nodes = "".join(f" 1 node_{number}\\n" for number in range(3))
    commands = {"srun": 'echo srun "$@" >> "$TOLD"; exec sleep "${RAY_LIVES:-20}"', "ray": f"printf '{nodes}'", "prelora": RUN}
    for name, body in (commands | {"scontrol": 'echo scontrol "$@" >> "$TOLD"'}).items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    of_slurm = {"SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_ON_NODE": "16", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
    return {**os.environ, **of_slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")}


def told(environment: dict[str, str]) -> list[str]:
    path = Path(environment["TOLD"])
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(("told_by", "goes_on"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_stops_the_run_and_the_end_of_its_time_brings_it_back(environment, told_by, goes_on):
    job = subprocess.Popen([SCRIPT, "recipe.yaml", "--set", "a=b c"], env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: "run train recipe.yaml --set a=b c" in told(environment), 20, "the run")
    job.send_signal(told_by)
    assert job.wait(20) == 130
    lines = told(environment)
    assert "stopped" in lines
    assert [line for line in lines if line.startswith("scontrol")] == (["scontrol requeue 7"] if goes_on else [])
    head, others = sorted((line for line in lines if line.startswith("srun")), key=lambda line: "--head" not in line)
    assert "--nodelist=n1" in head and "--num-cpus=16" in head
    assert "--nodes=2 --ntasks=2 --exclude=n1" in others


def test_a_run_whose_ray_was_ended_comes_back(environment):
    """As Slurm ends it where another job takes the nodes."""
    job = subprocess.run([SCRIPT, "recipe.yaml"], env=environment | {"ENDS": "1", "RAY_LIVES": "0"}, check=False)
    assert job.returncode == 1
    assert "scontrol requeue 7" in told(environment)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_job_ends_as_its_run_does(environment, status):
    job = subprocess.run([SCRIPT, "recipe.yaml"], env=environment | {"ENDS": str(status)}, check=False)
    assert job.returncode == status
    assert not [line for line in told(environment) if line.startswith("scontrol")]
