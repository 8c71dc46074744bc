"""`prelora bench network` on two CPU processes, and what its figures stand for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from prelora_ray.bench import network
from prelora_ray.config import ModelSettings
from prelora_ray.engine.model import create_model
from tests.command import COMMAND, ROOT, prelora_here

SMALL = ("network", "--image-size", "16", "--batch", "1", "--seconds", "0", "--bucket", "4")
"""One step a row."""


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    picture = tmp_path_factory.mktemp("network") / "network.html"
    link = ("--bandwidth", "10", "--bandwidth", "2")
    done = prelora_here("bench", *SMALL, *link, "--row", "full", "--row", "lora", "--picture", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    assert "not measured: lora fp8 (needs a GPU with products of e4m3)" in done.stderr
    assert "full, bf16 exchange" in picture.read_text()
    return json.loads(done.stdout)


@pytest.mark.slow
def test_rows_are_phases_over_links(result):
    names = [f"{what}, {link}" for what in ("full", "full, bf16 exchange", "lora") for link in LINKS]
    assert [row["name"] for row in result["rows"]] == names
    assert result["failed"] is None


LINKS = {"no limit": None, "10 Gbit/s": 10, "2 Gbit/s": 2}


@pytest.mark.slow
def test_full_exchanges_every_parameter(result):
    model = create_model(ModelSettings(name="vit_tiny_patch16_224", image_size=16), 1000, seed=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exchanged = {row["name"]: row["exchanged_bytes"] for row in result["rows"]}
    assert exchanged["full, no limit"] == 4 * parameters
    assert exchanged["full, bf16 exchange, no limit"] == 2 * parameters
    assert exchanged["lora, no limit"] < 2 * parameters


@pytest.mark.slow
def test_a_step_waits_for_one_link_that_carries_two_bytes_for_each(result):
    for row in result["rows"]:
        gbit = LINKS[row["name"].rpartition(", ")[2]]
        assert row["gbit_per_second"] == gbit
        busy = 0 if gbit is None else 2 * 8 * row["exchanged_bytes"] / gbit / 1e6
        assert busy <= row["link_milliseconds"] <= row["milliseconds"]  # else buckets would overlap on the link
        assert bool(row["link_milliseconds"]) == (gbit is not None)


@pytest.mark.slow
def test_speeds_are_multiples_of_fulls_over_the_same_link(result):
    full = {row["gbit_per_second"]: row["milliseconds"] for row in result["rows"][: len(LINKS)]}
    for row in result["rows"]:
        assert row["against_full"] == pytest.approx(full[row["gbit_per_second"]] / row["milliseconds"])


def test_what_was_measured_before_an_end_stands(monkeypatch):
    def die(measure: Any, arguments: tuple[Any, ...], **_: Any) -> None:
        Path(arguments[-1], "rows.jsonl").write_text('{"name": "full, no limit"}\n')
        raise ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 1, -9)

    monkeypatch.setattr(network, "start_processes", die)
    found = network.bench_network(network.Options("vit_tiny_patch16_224", 16, 1))
    assert found["rows"] == [{"name": "full, no limit"}]
    assert found["failed"] == "process 1 terminated with signal SIGKILL"


@pytest.mark.slow
def test_what_was_measured_before_a_worker_died_stands(tmp_path):
    command = [*COMMAND, "bench", *SMALL, "--bandwidth", "0.02", "--row", "full", "--out", str(tmp_path / "out.json")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        told = next(line for line in process.stderr if "no limit" in line)
        workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        workers[-1].kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the benchmark ended before its last row: process" in errors
    assert told.startswith("full, no limit: ")
    assert [row["name"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["full, no limit"]
