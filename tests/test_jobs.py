"""`ray job submit` from a fresh clone to a cluster of two machines of one's own that asks for a token: submit, follow,
stop, submit again, resume."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from tests.chaos.site import wait_for

ROOT = Path(__file__).parent.parent
EPOCHS = 30

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Command = Callable[..., subprocess.CompletedProcess[str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """`ray job ...` from a fresh clone with its environment activated, to two raylets of 2 CPUs that are started as
    docs/operations.md starts them on machines of one's own; ports are others, as those may be taken."""
    checkout = tmp_path_factory.mktemp("job") / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path must be short
    port = free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    head, other = re.findall(r"^    (ray start .*?) +#", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    address = f"127.0.0.1:{free_port()}"
    head = head.replace("6379", address.split(":")[1]) + f" --dashboard-port={port} --temp-dir={directory}"
    for start in (head, other.replace("HEAD:6379", address)):
        own = f"{start} --num-cpus=2 --dashboard-agent-listen-port={free_port()}"
        subprocess.run(own.split(), check=True, env=environment, capture_output=True)

    def call(verb: str, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        own = environment if token is None else {**environment, "RAY_AUTH_TOKEN": token}
        command = ["ray", "job", verb, "--address", f"http://127.0.0.1:{port}", *arguments]
        return subprocess.run(command, cwd=checkout, env=own, capture_output=True, text=True, check=False)

    yield call
    for process in psutil.process_iter(["cmdline"]):
        if any(directory in argument for argument in process.info["cmdline"] or ()):
            process.kill()


def as_documented() -> list[str]:
    """What README.md types behind `ray job submit`, with the digits' recipe, and without a storage."""
    (command,) = re.findall(r"^    ray job submit (.*) --storage /mnt/shared/runs$", (ROOT / "README.md").read_text(), re.M)
    return [re.sub(r"jobs/configs/\w+", "jobs/configs/digits", word) for word in command.split()]


def test_a_job_does_not_write_into_what_ray_uploads_and_removes(job: Command, digits: Path):
    told = job("submit", *as_documented(), "--set", f"data.path={digits}")
    assert told.returncode != 0
    assert re.search(r"prelora: '/.*/_ray_pkg_\w+/runs/digits' is not allowed in a job: ", told.stdout), told.stdout[-2000:]


def test_submit_follow_stop_and_resume(job: Command, digits: Path, tmp_path: Path):
    """Each of the two workers takes a raylet of its own: none has room for both."""
    folder = RunFolder(str(tmp_path / "digits"))
    train = [*as_documented(), "--storage", str(tmp_path)]
    settings = ["workers.cpus=2", f"data.path={digits}", f"train.epochs={EPOCHS}", "method.switch_epoch=12"]
    for setting in (*settings, "checkpoint.every_epochs=10"):
        train += ["--set", setting]
    refused = job("submit", "--submission-id", "nobody", "--no-wait", *train, token=secrets.token_hex(32))
    assert refused.returncode != 0

    submit = ("submit", "--submission-id", "first", "--no-wait", *train)
    wait_for(lambda: job(*submit).returncode == 0, 60, "the head's agent, which takes jobs,")
    wait_for(lambda: len(folder.read_lines("epochs.jsonl")) >= 3, 120, "three epochs")
    assert "epoch" in job("logs", "first").stdout
    assert job("stop", "first").returncode == 0
    assert "was stopped" in job("status", "first").stdout
    (stop,) = [line for line in folder.read_lines("events.jsonl") if line["event"] == "stop"]
    newest = Checkpoints(folder).names()[-1]
    assert newest.startswith(f"{stop['epoch']:05d}"), "the stop committed where it stood"

    second = job("submit", "--submission-id", "second", *train)
    assert second.returncode == 0, second.stdout[-2000:]
    restart = next(line for line in folder.read_lines("events.jsonl") if line["event"] == "restart")
    assert restart["step"] == stop["step"]
    assert folder.read_json("result.json")["epochs"] == EPOCHS
    assert sorted({line["epoch"] for line in folder.read_lines("epochs.jsonl")}) == list(range(EPOCHS))
    assert not Storage(str(tmp_path)).exists("nobody")
