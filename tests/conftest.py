"""What the tests share: one local Ray cluster, the digits prepared once, a model small enough for a CPU."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import ray
import torch
from torch import nn
from xdist.scheduler import LoadScopeScheduling

from prelora_ray.config import Settings
from prelora_ray.monitor.exporter import start_exporter
from prelora_ray.monitor.telemetry import run_label
from prelora_ray.run_folder import RunFolder
from prelora_ray.torchvision_ops import make_importable
from prelora_ray.train.run import train
from tests import prometheus
from tests.chaos.site import wait_for
from tests.disk import Disk, HangingDisk
from tests.disturbed import EACH_PHASE, Disturbed, train_disturbed
from tests.prometheus import Prometheus
from tests.proxy import Proxy, s3_server
from tests.runs import TINY_VIT, Reports, settings

make_importable()

import timm  # noqa: E402

torch.set_num_threads(1)
# Of all that the tests start: several processes share few cores, sum alike, and none waits for all others.
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
# Processes that tests start by fork server have it imported once for all of them.
multiprocessing.set_forkserver_preload(["prelora_ray.engine.state"])
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
# A shell starts what runs in the background with Ctrl-C ignored, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


PROCESSES = {
    **dict.fromkeys(("dashboards", "monitor", "report", "train"), "watched runs"),
    **dict.fromkeys(("bench", "sweep"), "forked runs"),
}
"""Folders whose tests look at the same runs, which take half a minute or more, and so share a process."""
TRAIN_FOR_MANY = {"undisturbed", "disturbed", "grid"}
"""Fixtures."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first."""

    def place(item: pytest.Item) -> int:
        fixtures = set(getattr(item, "fixturenames", ()))
        return 0 if fixtures & TRAIN_FOR_MANY else 1 if "ray_cluster" in fixtures else 2

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What is imported by then stays, and no collection of garbage, of which tests make many, looks at it again."""
    gc.freeze()


class Scheduling(LoadScopeScheduling):
    """Keeps the tests of a folder, or of folders that look at the same runs, in one process."""

    def _split_scope(self, nodeid: str) -> str:
        _, place, *_ = nodeid.split("::")[0].split("/")
        return PROCESSES.get(place, place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture
def vit() -> nn.Module:
    """A timm ViT of three blocks, width 16, for 8 x 8 images and 10 classes."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small file system of its own, which a test can fill."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=2000", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def hanging_disk(tmp_path: Path) -> Iterator[HangingDisk]:
    """A small file system of its own, which a test can have hang."""
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(2**25)
    for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(path)]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file's file system takes root and a loop device")
    yield HangingDisk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def proxy() -> Iterator[Proxy]:
    """The way to an S3 server of this machine, which this process and all it starts take for S3."""
    with s3_server() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def bucket(proxy: Proxy) -> str:
    """URI of a bucket."""
    return "s3://bucket"


@pytest.fixture(scope="session")
def trackers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """MLflow where it is installed, on this machine's disk for this process and all that it starts."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # a database takes ten seconds to be laid out
    os.environ["MLFLOW_TRACKING_URI"] = tmp_path_factory.mktemp("mlflow").as_uri()
    return ["mlflow"] if find_spec("mlflow") else []


@pytest.fixture(scope="session")
def ray_cluster(bucket: str, trackers: list[str]) -> Iterator[None]:
    """One embedded cluster with a few more CPUs than the machine has, as its workers mostly wait for each other."""
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path must be short
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray._private.worker._global_node.kill_log_monitor()  # it would read all logs ten times a second for nobody
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits, prepared."""
    from prelora_ray.data.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", str(out))
    return out


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests' runs lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def undisturbed(digits: Path, storage: Path) -> Callable[..., Settings]:
    """The undisturbed run on a number of workers, trained once; what it exported is beside it, in `<name>.metrics`, and
    what its workers reported to Ray in `<name>.reports`."""
    done: dict[tuple[int, str], Settings] = {}

    def get(workers: int, precision: str = "fp32") -> Settings:
        if (workers, precision) not in done:
            run = settings(digits, storage, f"plain-{workers}-{precision}", workers, train={"precision": precision})
            train(run, callbacks=[Reports(RunFolder.of(run))])
            done[workers, precision] = run
            with urllib.request.urlopen(f"http://{exporter(run)}/metrics", timeout=10) as answer:
                Path(RunFolder.of(run).path).with_suffix(".metrics").write_bytes(answer.read())
        return done[workers, precision]

    return get


@pytest.fixture(scope="session")
def disturbed(digits: Path, storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    """A run on two workers that hold every CPU, with a fault in each phase; watched where there is a Prometheus."""
    run = settings(digits, storage, "disturbed", 2, checkpoint={"every_steps": 4}, workers={"cpus": 2.0})
    if prometheus.PROGRAM is None:
        yield train_disturbed(run, EACH_PHASE)
        return
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), exporter(run))
    try:
        done = train_disturbed(run, EACH_PHASE)
        done.prometheus = server
        loss = RunFolder.of(run).epochs()[-1].loss
        wait_for(lambda: server.query(f'prelora_loss{{run="{run_label(run)}"}} == {loss!r}'), 30, "the last scrape")
        yield done
    finally:
        server.close()


def exporter(run: Settings) -> str:
    """Where the cluster's exporter listens."""
    return start_exporter(run.monitor.host, run.monitor.port)


def samples(folder: RunFolder) -> dict[tuple[int, int], list[int]]:
    """Samples of every global batch, sorted: those of the latest attempt at it, over all its workers."""
    batches: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for name in folder.list_files():
        for line in folder.read_lines(name) if name.startswith("samples-") and name.endswith(".jsonl") else []:
            place = line["epoch"], line["batch"]
            attempt, ids = batches.get(place, (-1, []))
            if line["attempt"] >= attempt:
                batches[place] = line["attempt"], (ids if line["attempt"] == attempt else []) + line["samples"]
    return {place: sorted(ids) for place, (_, ids) in batches.items()}
