"""What Prometheus reads, with its own parser."""

from __future__ import annotations

import json
import runpy
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from prelora_ray.config_file import parse_settings
from prelora_ray.method.phases import Phase
from prelora_ray.monitor.client import Client
from prelora_ray.monitor.exporter import (
    KEEP_SECONDS,
    NAME,
    NAMESPACE,
    SILENT_SECONDS,
    Board,
    Exporter,
    announce,
    serve,
    start_exporter,
)
from prelora_ray.monitor.metrics import RunMetrics, WorkerMetrics
from prelora_ray.monitor.telemetry import WorkerTelemetry, run_label
from prelora_ray.run_folder import RunFolder
from tests import prometheus
from tests.chaos.site import wait_for
from tests.runs import EPOCHS, settings

Series = dict[tuple[str, tuple[str, ...]], float]


def read(address: str) -> Series:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return parsed(answer.read().decode())


def parsed(page: str) -> Series:
    """{(name, label values in the order of their names): value}"""
    families = list(text_string_to_metric_families(page))
    samples = [sample for family in families for sample in family.samples]
    assert len({family.name for family in families}) == len(families)
    return {(s.name, tuple(s.labels[key] for key in sorted(s.labels))): s.value for s in samples}


def worker(run: str, rank: str, images: int) -> WorkerMetrics:
    metrics = WorkerMetrics()
    metrics.images.labels(run, rank, "full").inc(images)
    return metrics


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock) -> Board:
    return Board(clock)


@pytest.fixture
def address(board) -> Iterator[str]:
    server = serve(board, "127.0.0.1", 19464)
    yield "{}:{}".format(*server.server_address)
    server.shutdown()
    server.server_close()


def images(board_address: str) -> dict[tuple[str, ...], float]:
    """{(phase, run, worker): images}"""
    return {labels: value for (name, labels), value in read(board_address).items() if name == "prelora_images_total"}


def test_all_workers_of_all_runs_are_there_once_with_their_last_word(board, address):
    for run, rank, count in (("a", "0", 5), ("a", "1", 7), ("b", "0", 11), ("a", "0", 6)):
        board.update(run, rank, worker(run, rank, count).collect(), world_size=2)
    assert images(address) == {("full", "a", "0"): 6, ("full", "a", "1"): 7, ("full", "b", "0"): 11}


def test_workers_that_left_are_gone(board, address, clock):
    for rank in ("0", "1", "2"):
        board.update("a", rank, worker("a", rank, 1).collect(), world_size=3)
    board.update("a", "0", worker("a", "0", 2).collect(), world_size=2)  # the group shrank
    assert images(address) == {("full", "a", "0"): 2, ("full", "a", "1"): 1}
    clock.now += SILENT_SECONDS + 1
    board.update("a", "0", worker("a", "0", 3).collect(), world_size=2)
    assert images(address) == {("full", "a", "0"): 3}


def test_a_finished_runs_values_stay_for_a_while(board, address, clock):
    board.update("a", "0", worker("a", "0", 1).collect(), world_size=1)
    board.finish("a")
    clock.now += KEEP_SECONDS - 1
    assert images(address) == {("full", "a", "0"): 1}
    clock.now += 2
    assert images(address) == {}


def test_what_fell_silent_goes_too(board, address, clock):
    board.update("a", "0", worker("a", "0", 1).collect(), world_size=1)
    clock.now += KEEP_SECONDS + 1
    assert images(address) == {}


def test_the_page_of_metrics_is_up_to_date():
    docs = Path(__file__).parents[2] / "docs"
    reference = runpy.run_path(str(docs / "make_metrics.py"))["reference"]
    assert (docs / "metrics.md").read_text() == reference(), "run `python docs/make_metrics.py`"


def test_nothing_but_metrics_and_health_is_answered(address):
    with urllib.request.urlopen(f"http://{address}/healthz", timeout=10) as answer:
        assert answer.read() == b"ok\n"
    for request, status in (
        (urllib.request.Request(f"http://{address}/../etc/passwd"), 404),
        (urllib.request.Request(f"http://{address}/"), 404),
        (urllib.request.Request(f"http://{address}/metrics", data=b"x"), 501),
    ):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request, timeout=10)
        assert refusal.value.code == status


def test_a_taken_port_means_the_next_one(board):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = serve(board, "127.0.0.1", port)
        assert port < server.server_address[1] < port + 50
        assert server.server_address[0] == "127.0.0.1"
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("host", "start"), [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_its_address_is_what_prometheus_is_given(tmp_path, host, start):
    exporter = Exporter(host, 19600, str(tmp_path))
    exporter.update("a", "0", worker("a", "0", 5).collect(), world_size=1)
    assert exporter.address().startswith(start)
    assert images(exporter.address()) == {("full", "a", "0"): 5}


def test_prometheus_finds_every_exporter_of_the_machine(tmp_path):
    """With the project's own configuration but for the place of the files; an exporter that is gone loses its own."""
    program = prometheus.PROGRAM or pytest.skip("no prometheus on this machine (Debian: apt install prometheus)")
    config = (prometheus.CONFIG / "prometheus.yml").read_text()
    assert "[/tmp/ray/prelora-exporter-*.json]" in config
    config = config.replace("/tmp/ray", str(tmp_path)).replace("10s", "1s")
    (tmp_path / "prometheus.yml").write_text(config.replace("[alerts.yml]", f"[{prometheus.CONFIG}/alerts.yml]"))
    (tmp_path / "prelora-exporter-1.json").write_text('[{"targets": ["127.0.0.1:1"]}]')
    exporters = [Exporter("127.0.0.1", 19700, str(tmp_path)) for _ in range(2)]
    for number, exporter in enumerate(exporters):
        exporter.update(f"run {number}", "0", worker(f"run {number}", "0", 5).collect(), world_size=1)
    assert exporters[0].address() != exporters[1].address()
    with prometheus.serving(program, tmp_path / "prometheus.yml", tmp_path / "data") as query:
        wait_for(lambda: len(query("prelora_images_total == 5")) == 2, 30, "both runs")
        assert {found["metric"]["instance"] for found in query('up{job="prelora"}')} == {e.address() for e in exporters}


def test_an_exporter_of_every_network_is_asked_on_loopback(tmp_path):
    announce("0.0.0.0:9464", tmp_path)
    assert json.loads((tmp_path / "prelora-exporter-9464.json").read_text()) == [{"targets": ["127.0.0.1:9464"]}]


def test_the_rates_of_a_phase_that_is_over_are_gone(tmp_path):
    run = settings(tmp_path, tmp_path, "rates", 1, monitor={"enabled": False})
    telemetry = WorkerTelemetry(run, 10, 0, 1, torch.device("cpu"))

    def of_phases(name: str) -> dict[str, float]:
        page = generate_latest(telemetry._metrics.registry).decode()
        return {labels[0]: value for (found, labels), value in parsed(page).items() if found == name}

    for phase, images in ((Phase.FULL, 12), (Phase.LORA, 24)):
        telemetry.begin_epoch(phase, 8)
        telemetry.step(images, waited=0.0, exchanged=0.0)
        telemetry.send()
        assert of_phases("prelora_images_per_second").keys() == {phase}
    telemetry.end()
    assert of_phases("prelora_images_per_second") == {}
    assert of_phases("prelora_images_total") == {"full": 12, "lora": 24}, "counters go on"


def test_an_exporter_that_dies_comes_back_with_what_workers_say(ray_cluster):
    address = start_exporter("127.0.0.1", 19500)
    metrics = RunMetrics()
    metrics.restarts.labels("a", "failure").inc(3)
    client = Client("a", "run", metrics)
    series = ("prelora_restarts_total", ("failure", "a"))
    client.send(1)
    assert wait_for(lambda: read(address).get(series), 10, "the first message") == 3
    ray.kill(ray.get_actor(NAME, NAMESPACE), no_restart=False)
    metrics.restarts.labels("a", "failure").inc()

    def again() -> float | None:
        client.send(1)
        time.sleep(0.2)
        try:
            return read(start_exporter("127.0.0.1", 19500)).get(series)
        except (OSError, ray.exceptions.RayActorError):
            return None

    assert wait_for(again, 30, "the exporter's return") == 4


@pytest.mark.parametrize(("workers", "seconds"), [(1, 1.0), (128, 1.0), (512, 4.0)])
def test_so_many_messages_a_second_at_most(ray_cluster, monkeypatch, workers, seconds):
    start_exporter("127.0.0.1", 19500)
    now = 100.0
    monkeypatch.setattr("prelora_ray.monitor.client.time.monotonic", lambda: now)
    client = Client("a", "0", WorkerMetrics())
    assert client.is_due
    client.send(workers)
    now += seconds - 0.01
    assert not client.is_due
    now += 0.01
    assert client.is_due


def test_a_message_costs_the_same_among_any_number_of_workers():
    """Looks at the ranks that a run has, counted by a clock-free board: none where the group is as large as before."""
    looks = 0

    class Rank(str):
        def isdigit(self) -> bool:
            nonlocal looks
            looks += 1
            return super().isdigit()

    board = Board()
    for _ in range(3):
        for rank in range(50):
            board.update("a", Rank(rank), [], world_size=50)
    assert looks == 1, "at the group's first message"
    board.update("a", Rank(0), [], world_size=20)
    assert looks == 1 + 50
    assert sorted(map(int, board._said["a"])) == list(range(20))


def test_runs_are_told_apart_by_their_folder(monkeypatch, tmp_path):
    def label(storage: str) -> str:
        return run_label(parse_settings({"name": "digits", "storage": storage, "data": {"path": "x"}}))

    monkeypatch.chdir(tmp_path)
    assert label("/home/a/runs") == "/home/a/runs/digits" != label("/home/b/runs")
    assert label("runs") == label("./runs/") == label(f"file://{tmp_path}/runs") == f"{tmp_path}/runs/digits"
    assert label("s3://bucket/runs") == "s3://bucket/runs/digits"
    assert label("/home/a@b/runs") == "/home/a@b/runs/digits"


def test_a_run_exports_what_its_folder_says(undisturbed, storage):
    run = undisturbed(2)
    found = parsed((storage / f"{run.name}.metrics").read_text())
    label = run_label(run)
    epochs = RunFolder.of(run).read_lines("epochs.jsonl")
    counted: dict[str, float] = {}
    for (name, labels), value in found.items():
        if name == "prelora_images_total" and labels[1] == label:
            counted[labels[0]] = counted.get(labels[0], 0) + value
    phases = {line["phase"] for line in epochs}
    assert counted == {phase: sum(line["images"] for line in epochs if line["phase"] == phase) for phase in phases}
    steps = {
        labels[0]: value
        for (name, labels), value in found.items()
        if name == "prelora_step_seconds_count" and labels[1] == label
    }
    assert steps == {phase: 15 * sum(line["phase"] == phase for line in epochs) for phase in phases}
    assert found["prelora_epoch", (label,)] == found["prelora_epochs", (label,)] == EPOCHS
    assert found["prelora_remaining_seconds", (label,)] == 0
    assert not [name for name, labels in found if name == "prelora_images_per_second" and label in labels], "it trains no more"
    assert found["prelora_loss", (label,)] == epochs[-1]["loss"]
    assert found["prelora_val_top1_ratio", (label,)] == epochs[-1]["val_top1"]
    assert found["prelora_phase_info", ("lora", label)] == 1
    ranks = {
        labels[0]: value for (name, labels), value in found.items() if name == "prelora_adapter_rank" and labels[1] == label
    }
    assert ranks == RunFolder.of(run).read_json("ranks.json")
    window = RunFolder.of(run).read_lines("windows.jsonl")[-1]
    for family, change in window["change"].items():
        assert found["prelora_norm_change_percent", (family, label)] == change
