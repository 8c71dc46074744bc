"""Runs at MLflow and at Weights & Biases, read back; and services that cannot be reached, which no run waits for."""

from __future__ import annotations

import socket
import struct
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.errors import UserError
from prelora_ray.monitor.loggers import Loggers, _identity, check_loggers, tell_end
from prelora_ray.monitor.tracker import Courier
from prelora_ray.records import EpochLine, Event, WindowLine
from prelora_ray.run_folder import RunFolder
from tests.chaos.site import wait_for
from tests.lines import epoch_line, event

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="the extra mlflow is not installed")
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="the extra wandb is not installed")
WINDOW = {"change": {"query": 7.5}, "loss_change": 40.0, "converged": False, "in_ramp": False}


def settings(*loggers: str) -> Settings:
    pattern = {r"blocks\.0\.(attn|mlp)\..*": 4}  # a key that MLflow does not take as it is
    return parse_settings(
        {
            "name": "tracked",
            "data": {"path": "d"},
            "train": {"epochs": 20, "ramp_epochs": 2},
            "method": {"rank_pattern": pattern},
            "monitor": {"loggers": list(loggers)},
        }
    )


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.setattr("prelora_ray.monitor.tracker._END_SECONDS", 200.0)  # for a machine with much to do
    folder = RunFolder(tmp_path / "run")
    folder.make()
    folder.write_records(Event, [event("run_started", world_size=1, time=17.5)])
    return folder


def train(folder: RunFolder, run: Settings, attempt: int, epochs: range, *, dies: bool = False) -> None:
    """What an attempt logs and records. The loss tells the attempt."""
    log = Loggers(folder, run, attempt, epochs.start)
    log.samples(epochs.start, np.full((4, 8, 8, 3), 200, np.uint8))
    lines = folder.records(EpochLine)
    for epoch in epochs:
        log.window(WindowLine(attempt=attempt, phase="full", window=epoch, epoch_end=epoch + 1, loss=1.0, **WINDOW))
        lines.append(epoch_line(epoch, attempt=attempt, loss=epoch + attempt / 10))
        log.epoch(lines[-1])
    folder.write_records(EpochLine, lines)
    log.end("finished", lambda: None) if not dies else arrive(log)


def arrive(log: Loggers) -> None:
    """All that was logged arrives, but no end: as before a kill."""
    for courier in log._couriers:
        while not courier._work.empty():
            time.sleep(0.01)
        time.sleep(0.1)


@pytest.fixture
def mlflow_client(tmp_path, monkeypatch) -> Any:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to be laid out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    return mlflow.MlflowClient()


@needs_mlflow
def test_a_run_at_mlflow_goes_on_after_a_kill_without_doubles(folder, mlflow_client):
    """The second attempt trains epochs 2 and 3 again, which MLflow has already."""
    run = settings("mlflow")
    train(folder, run, 0, range(4), dies=True)
    train(folder, run, 1, range(2, 6))
    experiment = mlflow_client.get_experiment_by_name("tests").experiment_id
    (found,) = mlflow_client.search_runs([experiment])
    assert (found.info.run_name, found.info.status) == ("tracked", "FINISHED")
    assert found.data.params["train.epochs"] == "20" and found.data.params["train.ema"] == "null"
    for tag, values in {"loss/train": [0.0, 1.0, 2.0, 3.0, 4.1, 5.1], "norm_change_percent/query": [7.5] * 6}.items():
        history = mlflow_client.get_metric_history(found.info.run_id, tag)
        assert sorted((entry.step, entry.value) for entry in history) == list(zip(range(1, 7), values, strict=True))
    assert [file.path for file in mlflow_client.list_artifacts(found.info.run_id, "samples")] == ["samples/00001.png"]


@needs_mlflow
def test_what_mlflow_lacks_of_earlier_attempts_comes_later(folder, mlflow_client):
    """As where it was not to be reached then; and a run of that name begun anew is another one."""
    train(folder, settings(), 0, range(3))
    train(folder, settings("mlflow"), 1, range(3, 5))
    folder.write_records(Event, [event("run_started", world_size=1, time=18.5)])
    train(folder, settings("mlflow"), 0, range(1))
    experiment = mlflow_client.get_experiment_by_name("tests").experiment_id
    newest, first = (run.info.run_id for run in mlflow_client.search_runs([experiment], order_by=["start_time DESC"]))
    steps = [[entry.step for entry in mlflow_client.get_metric_history(run, "loss/train")] for run in (first, newest)]
    assert [sorted(each) for each in steps] == [[1, 2, 3, 4, 5], [1]]


@needs_mlflow
def test_mlflow_hears_of_an_end_that_the_workers_could_not_tell(folder, mlflow_client):
    """With what it lacks; and nothing of a run that never began."""
    run = settings("mlflow").model_copy(update={"storage": str(Path(folder.path).parent), "name": "run"})
    train(folder, run, 0, range(2), dies=True)
    train(folder, settings(), 1, range(2, 4))
    tell_end(run, "failed")
    tell_end(run.model_copy(update={"name": "never-begun"}), "failed")
    (found,) = mlflow_client.search_runs([mlflow_client.get_experiment_by_name("tests").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FAILED")
    history = mlflow_client.get_metric_history(found.info.run_id, "loss/train")
    assert sorted((entry.step, entry.value) for entry in history) == [(1, 0.0), (2, 1.0), (3, 2.1), (4, 3.1)]


@pytest.mark.slow  # its service takes half a minute to start on a busy machine, and logs into what tests read
@needs_wandb
def test_a_run_at_wandb_is_read_back_from_what_it_wrote_offline(folder, monkeypatch):
    """Each attempt's file has every step once, under the same id: the last one is the whole run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = settings("wandb")
    train(folder, run, 0, range(4))
    train(folder, run, 1, range(2, 6))
    first, second = sorted(Path(folder.path).glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert first.name == second.name
    for path, attempts, steps in ((first, [0] * 4, range(1, 5)), (second, [0, 0, 1, 1, 1, 1], range(1, 7))):
        records = read_wandb(path)
        (begun,) = (record.run for record in records if record.HasField("run"))
        assert (begun.run_id, begun.display_name, begun.project) == (path.stem.removeprefix("run-"), "tracked", "prelora")
        assert {"train.epochs": "20"}.items() <= {item.key: item.value_json for item in begun.config.update}.items()
        rows = [row for record in records if (row := history(record))]
        assert [int(row["_step"]) for row in rows] == list(steps)
        losses = [step - 1 + attempt / 10 for step, attempt in zip(steps, attempts, strict=True)]
        assert [float(row["loss/train"]) for row in rows] == pytest.approx(losses)
        assert ["samples/path" in row for row in rows].count(True) == 1
    tell_end(run.model_copy(update={"storage": str(Path(folder.path).parent), "name": "run"}), "failed")
    newest = max(Path(folder.path).glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    codes = [[record.exit.exit_code for record in read_wandb(path) if record.HasField("exit")] for path in (second, newest)]
    assert codes == [[0], [1]]


def read_wandb(path: Path) -> list[Any]:
    """Records of a file as W&B writes it: blocks of 32 KiB as in LevelDB's logs, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, pending, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        pending += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            records.append(record)
            pending = b""
    return records


def history(record: Any) -> dict[str, str]:
    return {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


@pytest.mark.parametrize(
    "name", [pytest.param("mlflow", marks=needs_mlflow), pytest.param("wandb", marks=[needs_wandb, pytest.mark.slow])]
)
def test_no_run_waits_for_a_service_that_cannot_be_reached(folder, monkeypatch, name):
    """Nor for one that takes connections and never answers."""
    monkeypatch.setattr("prelora_ray.monitor.tracker._END_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        begin, beats = time.monotonic(), []
        log = Loggers(folder, settings(name), 0, 0)
        log.samples(0, np.zeros((1, 8, 8, 3), np.uint8))
        log.epoch(epoch_line(0))
        assert log.flush()
        assert time.monotonic() - begin < 1
        log.end("preemption", lambda: beats.append(1))  # nodes that go have no time for it
        assert beats == []
        log.end("finished", lambda: beats.append(1))
        assert beats
    if name == "mlflow":  # W&B gives up after a minute or more
        wait_for(lambda: not log._couriers[0]._thread.is_busy, 30, "the end of what nobody waits for")


def test_what_nobody_waits_for_is_not_tried_again(monkeypatch, caplog):
    monkeypatch.setattr("prelora_ray.monitor.tracker._END_SECONDS", 0.05)
    tries = []

    def connect() -> Any:
        tries.append(1)
        raise OSError("no way")

    courier = Courier("mlflow", connect, [])
    courier.end("finished", lambda: None)
    wait_for(lambda: not courier._thread.is_busy, 5, "its thread's end")
    assert len(tries) == 1
    assert caplog.records[-1].message == "mlflow lacks what has not arrived within 0.05 s"


def test_what_fails_is_tried_again_in_its_order_and_images_are_not(monkeypatch, caplog):
    monkeypatch.setattr("prelora_ray.monitor.tracker._RETRY_SECONDS", 0.01)
    courier = Courier("flaky", Flaky, [(1, {"a": 1.0})])
    courier.samples(2, np.zeros((8, 8, 3), np.uint8))
    courier.scalars(2, {"a": 2.0})
    courier.end("failed", lambda: None)
    assert Flaky.logged == [(1, {"a": 1.0}), (2, {"a": 2.0}), "failed"]
    assert Flaky.sheets == 1
    told = [record.message.split(":")[0] for record in caplog.records if record.message.startswith("flaky ")]
    assert told == [f"flaky {what}" for what in (*["is tried again"] * 2, "has no sheet of images", *["is tried again"] * 2)]


def test_a_services_address_is_logged_without_its_password(monkeypatch, caplog):
    monkeypatch.setattr("prelora_ray.monitor.tracker._RETRY_SECONDS", 0.01)
    fails = iter([True, False])

    def connect() -> Any:
        if next(fails):
            raise OSError("API request to https://me:hush@host failed")
        return SimpleNamespace(end=lambda outcome: None)

    Courier("mlflow", connect, []).end("failed", lambda: None)
    assert "https://...@host failed" in caplog.text and "hush" not in caplog.text


def test_a_fork_that_is_made_anew_is_another_run_at_a_service(tmp_path):
    """Its first event is its trunk's."""
    identities = set()
    for time_of_start in (5.0, 6.0):
        fork = RunFolder(tmp_path / f"{time_of_start}")
        fork.write_records(
            Event, [event("fork", attempt=-1, time=1.0, trunk="t"), event("run_started", world_size=1, time=time_of_start)]
        )
        identities.add(_identity(fork, settings()))
    assert len(identities) == 2


class Flaky:
    """Fails at every other call."""

    calls, sheets = 0, 0
    logged: list[Any] = []  # noqa: RUF012
    last_step = 0

    def __init__(self) -> None:
        self._stumble()

    def _stumble(self) -> None:
        Flaky.calls += 1
        if Flaky.calls % 2:
            raise OSError("no way there")

    def scalars(self, step: int, values: dict[str, float], seconds: float) -> None:
        self._stumble()
        self.logged.append((step, values))

    def samples(self, step: int, page: Any) -> None:
        Flaky.sheets += 1
        raise OSError("no room")

    def end(self, outcome: str) -> None:
        self._stumble()
        self.logged.append(outcome)


def test_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_loggers(settings("tensorboard"))
    with pytest.raises(UserError, match=r"^monitor\.loggers = wandb needs wandb: pip install 'prelora-ray\[wandb\]'$"):
        check_loggers(settings("tensorboard", "wandb"))
