"""Dashboards and alerts against a real Prometheus that watched a real run."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prelora_ray.monitor.telemetry import run_label
from prelora_ray.run_folder import RunFolder
from tests.disturbed import EACH_PHASE, Disturbed

ROOT = Path(__file__).parents[2] / "dashboards"
GPU_ONLY = {
    "GPU memory by phase",
    "GPU utilization of nodes",
    "GPU utilization by worker",
    "GPU power by worker",
    "MFU by phase",
}
"""Panels that no run on a CPU has data for."""


def needs(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program} on this machine (Debian: apt install prometheus)")
    return path


def panels() -> list[tuple[str, str]]:
    """(title, expression) of every query of every panel, and of every annotation."""
    found = []
    for path in sorted((ROOT / "grafana").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            found += [(panel["title"], target["expr"]) for target in panel.get("targets", [])]
        found += [(annotation["name"], annotation["expr"]) for annotation in board["annotations"].get("list", [])]
    return found


def test_the_files_are_what_the_sdk_builds():
    for name, content in runpy.run_path(str(ROOT / "build.py"))["built"]().items():
        assert (ROOT / "grafana" / name).read_text() == content, "run `python dashboards/build.py`"


def test_every_panel_says_what_it_shows():
    for path in (ROOT / "grafana").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                assert panel["description"]
                assert panel["fieldConfig"]["defaults"]["unit"]
                assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"]


def test_the_run_begins_with_tiles_of_where_it_stands():
    _, *board = json.loads((ROOT / "grafana" / "run.json").read_text())["panels"]
    tiles = list(itertools.takewhile(lambda panel: panel["type"] == "stat", board))
    assert [tile["title"] for tile in tiles[:4]] == ["Phase", "Epoch", "Time left", "Top-1"]
    assert {tile["gridPos"]["y"] for tile in tiles} == {tiles[0]["gridPos"]["y"]}, "in one row"


def test_norm_changes_are_on_a_logarithm():
    panels_ = {panel["title"]: panel for panel in json.loads((ROOT / "grafana" / "run.json").read_text())["panels"]}
    custom = panels_["Norm change by family, against tau"]["fieldConfig"]["defaults"]["custom"]
    assert custom["scaleDistribution"] == {"log": 10, "type": "log"}


@pytest.mark.parametrize("heights", [[0.5] * 7, [0.0, 0.01, 1.0], [0.99, 1.0], [0.2, 0.9, 0.25, 0.24], []])
def test_labels_of_the_drawn_panels_do_not_overlap(heights):
    """They stay in order, inside the panel, and where they are if there is room."""
    draw = runpy.run_path(str(ROOT.parent / "docs" / "draw_panels.py"))
    moved, gap = draw["spread"](heights), draw["LABEL"]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(sorted(moved)))
    assert all(0 <= height <= 1 for height in moved)
    assert sorted(range(len(heights)), key=heights.__getitem__) == sorted(range(len(moved)), key=moved.__getitem__)
    assert draw["spread"]([0.1, 0.9]) == [0.1, 0.9]


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_is_content(arguments):
    command = [needs("promtool"), *arguments[:2], str(ROOT / "prometheus" / arguments[2])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_and_explained():
    rules = yaml.safe_load((ROOT / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    tested = (ROOT / "prometheus" / "alerts_test.yml").read_text()
    index = (ROOT.parent / "docs" / "alerts.md").read_text()
    for rule in rules:
        assert f"alertname: {rule['alert']}" in tested
        assert f"(alerts/{rule['alert']}.md)" in index
        assert (ROOT.parent / rule["annotations"]["page"]).read_text().startswith(f"# {rule['alert']}\n")


Watched = tuple[RunFolder, str, Callable[[str], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def watched(disturbed: Disturbed) -> Iterator[Watched]:
    """A run that goes on after a fault in each phase, its label, and what asks the Prometheus that saw it."""
    needs("prometheus")
    assert disturbed.prometheus
    yield RunFolder.of(disturbed.run), run_label(disturbed.run), disturbed.prometheus.query
    disturbed.prometheus.close()  # nobody else asks it


def filled_in(expression: str, label: str) -> str:
    return expression.replace("$run", label).replace("$dataset", ".+").replace("$__rate_interval", "2m")


def test_every_query_of_every_panel_has_data(watched):
    _, label, query = watched
    for title, expression in panels():
        found = query(f"last_over_time(({filled_in(expression, label)})[5m:1s])")  # Ray's series end with the run
        if title in GPU_ONLY:
            assert not found
        elif not title.endswith("begins"):
            assert found, f"{title}: {expression}"


def test_phase_changes_are_annotated(watched):
    _, label, query = watched
    for title, expression in panels():
        if title.endswith("begins"):
            assert query(f"max_over_time(({filled_in(expression, label)})[5m:1s])"), title


def test_the_numbers_are_those_of_the_run_folder(watched):
    folder, label, query = watched
    epochs = folder.read_lines("epochs.jsonl")

    def value(expression: str) -> float:
        (found,) = query(expression)
        return float(found["value"][1])

    of = f'{{run="{label}"}}'
    assert value(f"prelora_loss{of}") == epochs[-1]["loss"]
    assert value(f"prelora_val_top1_ratio{of}") == epochs[-1]["val_top1"]
    assert value(f"prelora_trainable_parameters{of}") == epochs[-1]["trainable_parameters"]
    restarts = folder.read_json("result.json")["restarts"]
    assert value(f"sum(prelora_restarts_total{of})") == restarts == len(EACH_PHASE)
    lines = [line for rank in (0, 1) for line in folder.read_lines(f"samples-{rank}.jsonl")]
    last = sum(len(line["samples"]) for line in lines if line["attempt"] == restarts)
    assert value(f'sum(prelora_images_total{{run="{label}", phase="lora"}})') == last > 1438
    assert value(f"sum(prelora_images_total{of})") == last, "workers that were started anew in lora tell of no other phase"
    assert not query(f"prelora_images_total{of} == 0")
    ranks = folder.read_json("ranks.json")
    assert value(f"count(prelora_adapter_rank{of})") == len(ranks)
    assert value(f"sum(prelora_adapter_rank{of})") == sum(ranks.values())


def test_every_alert_can_be_evaluated_and_a_healthy_run_raises_none(watched):
    _, label, query = watched
    rules = yaml.safe_load((ROOT / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        alarms = [found for found in query(rule["expr"]) if found["metric"].get("run") == label]
        assert not alarms, rule["alert"]


def test_every_name_is_one_that_is_exported():
    page = (ROOT.parent / "docs" / "metrics.md").read_text()
    for title, expression in panels():
        for name in re.findall(r"prelora_\w+", expression):
            assert f"`{re.sub('_(bucket|sum)$', '', name)}`" in page, title
