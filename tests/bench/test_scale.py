"""`prelora bench scale`: what it makes of samples, by hand, and a run of one, two and three workers."""

from __future__ import annotations

import json
import subprocess

import pytest

from prelora_ray.bench.parts import Sample, Span, costs
from prelora_ray.bench.processes import Usage
from tests.command import COMMAND, ROOT

RAYLET, HEAD, DRIVER, RANK_0 = 10, 20, 30, 40
COMMANDS = {
    DRIVER: "python -m prelora_ray train",
    HEAD: "/ray/raylet --head",
    21: "gcs_server",
    22: "ray::TrainController",
    RAYLET: "/ray/raylet --x",
    11: "ray::DashboardAgent",
    12: "ray::PlacementGroupCleaner",
    RANK_0: "ray::RayTrainWorker",
    41: "ray::RayTrainWorker.poll_status",
    42: "ray::RayTrainWorker",
}
PARENTS = {HEAD: DRIVER, 21: DRIVER, 22: HEAD, RAYLET: DRIVER, 11: RAYLET, 12: HEAD, RANK_0: RAYLET, 41: RAYLET, 42: RAYLET}


def sample(at: float, cpu: dict[int, float], sockets: dict[int, dict[int, tuple[int, int]]] | None = None) -> Sample:
    processes = {
        pid: Usage(command, PARENTS.get(pid, 1), cpu.get(pid, 0.0), 2**20, 3, (sockets or {}).get(pid, {}))
        for pid, command in COMMANDS.items()
    }
    return Sample(at, DRIVER, RANK_0, processes)


def test_processes_are_parts_of_a_run():
    now = sample(0, {})
    assert {pid: now.part(pid) for pid in COMMANDS} == {
        DRIVER: "driver",
        HEAD: "head",
        21: "head",
        22: "Ray Train's controller",
        RAYLET: "another node",
        11: "another node",
        12: "other actors",
        RANK_0: "rank 0",
        41: "another worker",
        42: "another worker",
    }


def test_a_sample_comes_back_from_its_line():
    now = sample(3.5, {41: 0.25}, {41: {7: (1, 100)}})
    assert Sample.from_json(now.to_json()) == now


def test_what_a_second_a_step_and_an_epoch_take():
    """Rank 0 takes 2 ms a second, 3 ms a step and 5 ms an epoch; the two others 1, 0 and 7 ms together."""
    moments = [(0, 0, 0), (20, 20, 1), (24, 120, 2), (34, 130, 12)]
    of_rank_0 = [(2 * seconds + 3 * steps + 5 * epochs) / 1e3 for seconds, steps, epochs in moments]
    of_others = [(seconds + 7 * epochs) / 1e3 for seconds, _, epochs in moments]
    samples = [
        sample(moment[0], {RANK_0: own, 41: others}) for moment, own, others in zip(moments, of_rank_0, of_others, strict=True)
    ]
    told = [
        Span(samples[i], samples[i + 1], moments[i + 1][1] - moments[i][1], moments[i + 1][2] - moments[i][2]) for i in range(3)
    ]
    found = costs(Span(sample(-9, {}), samples[0]), told, Span(samples[-1], sample(40, {21: 0.5})), workers=3, nodes=1)
    each = ("second", "step", "epoch")
    assert [found["rank 0", of_what, "cpu_ms"] for of_what in each] == pytest.approx([2, 3, 5])
    assert [found["another worker", of_what, "cpu_ms"] for of_what in each] == pytest.approx([0.5, 0, 3.5], abs=1e-9)
    assert found["head", "restart", "cpu_ms"] == 500
    assert (found["run", "start", "seconds"], found["run", "restart", "seconds"]) == (9, 6)
    assert found["another worker", "process", "memory_mib"] == 1
    assert found["head", "process", "open_files"] == 6


def test_packets_and_bytes_are_those_of_connections_that_are_open_or_new():
    before = sample(0, {}, {RANK_0: {1: (5, 500), 2: (1, 10)}})
    after = sample(1, {}, {RANK_0: {1: (8, 800), 3: (2, 20)}})
    used = Span(before, after).used()
    assert (used["rank 0", "", "packets"], used["rank 0", "", "bytes"]) == (5, 320)


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[tuple[str, str, str], list[float]]:
    """Of a run of 1, 2 and 3 workers on a node: values by (part, each of what, measured)."""
    out, picture = (tmp_path_factory.mktemp("scale") / name for name in ("scale.json", "scale.html"))
    workers = [word for n in (1, 2, 3) for word in ("--workers", str(n))]
    size = ("--workers-per-node", "3", "--seconds", "8", "--steps", "200", "--epochs", "8")
    command = [*COMMAND, "bench", "scale", *workers, *size, "--out", str(out), "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 0" in picture.read_text()
    result = json.loads(out.read_text())
    assert result["missing"] == {}
    return {(row["name"], row["each"], row["measured"]): [row[f"{n}_workers"] for n in (1, 2, 3)] for row in result["rows"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_messages_and_bytes_of_a_worker_do_not_grow_with_their_number(figures):
    """What two workers have in each second and step, three have too; rank 0 hears no more of others than of none."""
    for what, slack in (("packets", 2.0), ("bytes", 1000.0)):
        for each in ("second", "step"):
            _, of_two, of_three = figures.get(("another worker", each, what), [0.0, 0.0, 0.0])
            assert (each, what) == ("step", "bytes") or of_two > 0
            assert of_three < 1.25 * of_two + slack, (each, what)
        alone, _, of_three = figures["rank 0", "second", what]
        assert of_three < 1.25 * alone + slack, what


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_more_sends_as_much_as_the_one_before(figures):
    for part in ("exporter", "Ray Train's controller"):
        for what in ("packets", "bytes"):
            of_one, of_two, of_three = figures[part, "second", what]
            assert 0 < of_three - of_two < 1.5 * (of_two - of_one), (part, what)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_request_goes_once_to_each_worker(figures):
    """Rank 0's of a step: a packet to each of two others, and gloo's own answer to each."""
    _, of_two, of_three = figures["rank 0", "step", "packets"]
    assert 0 < of_two < 4 and of_two < of_three < 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_epoch_waits_for_no_report_of_all_workers(figures):
    assert ("Ray Train's barrier", "epoch", "packets") not in figures
