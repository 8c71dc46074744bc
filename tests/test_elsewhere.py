"""A driver in one folder, its cluster's nodes in another, one of which lacks a share that the others have."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from prelora_ray.run_folder import RunFolder
from tests.chaos.site import wait_for
from tests.command import COMMAND
from tests.runs import TINY_VIT

RAY = str(Path(sys.executable).parent / "ray")
ON_A_NODE_WITHOUT_IT = 'mount -t tmpfs none "$0" && ulimit -n 2000 && exec "$@"'
RECIPE = f"""
data: {{path: data, source: digits, batch_size: 96, cell: 12, crop_ratio: 1.0, decoders: 1}}
model: {{name: vit_tiny_patch16_224, image_size: 8, options: {json.dumps(TINY_VIT)}}}
train: {{epochs: 2, ramp_epochs: 1}}
method: {{enabled: false}}
"""
Command = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`here`, where the driver is started; `there`, where Ray was; `share`, which one node does not have."""
    root = tmp_path_factory.mktemp("elsewhere")
    for name in ("here", "there", "share"):
        (root / name).mkdir()
    for library in ("ray", "timm", "torch", "yaml"):
        (root / "here" / library).mkdir()
        (root / "here" / library / "__init__.py").write_text(f"raise ImportError('{library} of the current folder')\n")
    (root / "here" / "tiny.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def command(place: Path) -> Iterator[Command]:
    """`prelora` in `here`, with a cluster of two nodes whose processes are in `there`."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a node of its own mounts needs root")
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path must be short
    with contextlib.chdir(place / "there"), pytest.MonkeyPatch.context() as patch, open(place / "node.log", "wb") as log:
        patch.setenv("RAY_TMPDIR", directory)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        node = [RAY, "start", "--block", f"--address={cluster.address}", "--num-cpus=1"]
        without = ["unshare", "-m", "sh", "-c", ON_A_NODE_WITHOUT_IT, str(place / "share"), *node]
        process = subprocess.Popen(without, stdout=log, stderr=log)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        return subprocess.run(
            [*COMMAND, *arguments], cwd=place / "here", env=environment, capture_output=True, text=True, check=False
        )

    try:
        wait_for(lambda: len(cluster.global_state._live_node_ids()) == 2, 60, "the second node")
        yield call
    finally:
        process.terminate()
        process.wait()
        cluster.shutdown()


def test_relative_paths_are_those_of_the_driver_and_so_are_libraries(place: Path, command: Command):
    """The driver's folder holds other things by the names of libraries; in the nodes' folder nothing is written."""
    prepared = command("prepare", "digits", "data", "--json")
    assert prepared.returncode == 0, prepared.stderr
    assert {path.name for path in (place / "here" / "data").iterdir()} == {
        *("manifest.json", "parts", "train-00000.parquet", "val-00000.parquet"),
    }
    trained = command("train", "tiny.yaml", "--json")
    assert trained.returncode == 0, trained.stderr
    run = RunFolder(place / "here" / "runs" / "tiny")
    assert len(run.read_lines("epochs.jsonl")) == 2
    told = command("evaluate", "runs/tiny", "data", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["top1"] == run.read_json("result.json")["val_top1"]
    assert not list((place / "there").iterdir())
    shutil.copytree(place / "here" / "data", place / "share" / "prepared")
    refused = command("evaluate", "runs/tiny", "../share/prepared")
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    assert f"{str(place / 'share' / 'prepared')!r} is not there on node " in refused.stderr


def test_the_doctor_names_the_node_that_is_not_as_it_should_be(place: Path, command: Command):
    """It lacks the share, and may open few files; the folder `here` it sees."""
    told = command("doctor", "--cluster", "../share", "--json")
    assert told.returncode == 1, told.stderr
    content = json.loads(told.stdout)
    assert len(content["nodes"]) == 2
    (wrong,) = [node["name"] for node in content["nodes"] if node["open_files"] == 2000]
    few, unseen = content["findings"]
    assert few == f"{wrong}: a process may open 2000 files; allow 4096 (ulimit -n)"
    share = place / "share"
    assert unseen.startswith(f"{wrong}: it does not read what was written into {str(share)!r} (FileNotFoundError); mount it")
    assert not [path for path in share.iterdir() if path.name.startswith(".seen-")]
    assert command("doctor", "--cluster", "../here").stdout.splitlines()[1:] == ["2 nodes: 1 finding"]


@pytest.mark.parametrize(
    ("arguments", "unseen"),
    [
        (["prepare", "digits", "../share/new"], "new"),
        (["prepare", "../share/images", "images"], "images"),
        (["train", "tiny.yaml", "--storage", "../share/runs"], "runs/tiny"),
        (["train", "tiny.yaml", "--set", "data.path=../share/data", "--name", "other"], "data"),
    ],
)
def test_what_a_node_does_not_see_is_told_before_work_starts(place: Path, command: Command, arguments: list[str], unseen: str):
    (place / "share" / "images").mkdir(exist_ok=True)
    refused = command(*arguments)
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    *_, sentence = refused.stderr.strip().splitlines()  # behind the steps of a start
    assert f"{str(place / 'share' / unseen)!r} is not there on node " in sentence
    made = (place / "share" / unseen).rglob("*")
    assert not [path for path in made if path.suffix in (".parquet", ".json", ".jsonl", ".yaml")]
