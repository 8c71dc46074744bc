"""What a person sees is what was said: no text is taken for markup."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from prelora_ray.config import MethodSettings
from prelora_ray.config_file import parse_settings
from prelora_ray.inference.evaluate import EvaluationReport
from prelora_ray.recorded.replay import Record, replay
from prelora_ray.recorded.run import RunRecords
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.map import Point
from prelora_ray.tasks.classification import ImageEvaluation
from prelora_ray.terminal import console
from tests.lines import epoch_line, norms_line

TEXT = "runs/[old]/:x: [/bold] [red]"
REPORT = EvaluationReport(ImageEvaluation(loss=1.0, top1=0.5, top5=1.0, images=2), (TEXT, "b"), torch.tensor([[0, 1], [1, 0]]))
SWEEP = {
    "path": TEXT,
    **{"unit": "CPU-hours", "measure": "val_top1", "pareto": [], "controls": []},
    "full": {"cost": 1.0, "val_top1": 0.5, "trial": "trunk"},
    "settings": [
        {
            **{"setting": {"method.freeze": "all"}, "switch_epoch": 1, "trainable_fraction": 0.1, "cost": 1.0},
            **{"val_top1": None, "ended": "failed", "diagnosis": [], "trial": "t", "message": TEXT},
        }
    ],
}
BENCH = {"benchmark": TEXT, "device": "cpu", "date": "today", "rows": [{"name": TEXT}]}


def run_of_an_epoch() -> RunRecords:
    run = RunRecords(RunFolder(TEXT))
    vars(run).update(settings=parse_settings({"name": "run", "data": {"path": "data"}}), epochs=[epoch_line(0)])
    return run


def printed(what: Any) -> str:
    with console.out.capture() as capture:
        console.out.print(what)
    return capture.get()


@pytest.mark.parametrize(
    ("shown", "times"),
    [
        (lambda: TEXT, 1),
        (lambda: console.result_table(run_of_an_epoch()), 1),
        (lambda: console.sweep_table(SWEEP), 2),
        (lambda: console.classes_table(REPORT), 1),
        (lambda: console.confusion_table(REPORT), 2),
        (lambda: console.bench_table(BENCH), 2),
    ],
    ids=["line", "run", "sweep", "classes", "confusion", "bench"],
)
def test_names_and_paths_are_shown_as_they_are(shown: Callable[[], Any], times: int):
    assert printed(shown()).count(TEXT) == times


def test_a_bar_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch):
    terminal = Console(**console._PLAIN, force_terminal=True, width=160, file=io.StringIO())
    monkeypatch.setattr(console, "err", terminal)
    with console.progress(TEXT) as show:
        show(1, 2)
    assert TEXT in terminal.file.getvalue()


def test_a_map_of_many_pairs_has_a_row_for_each_switch():
    """Its counts and ranges are those of the points."""
    ranks = {"blocks.0.mlp.fc1": 4}
    points = [
        Point(tau, zeta, None if tau < 0.5 else 9 if tau * zeta > 50 else 12, ranks, 0.25, 0.2, 1.5)
        for tau, zeta in itertools.product([0.1, *range(1, 32)], range(1, 33))
    ]
    lines = [re.split(r" *[│┃] *", line)[1:-1] for line in printed(console.switch_map_table(points)).splitlines()]
    rows = {cells[3]: cells for cells in lines if len(cells) == 8 and cells[2] != "pairs"}
    assert list(rows) == ["9", "12", "never"]
    for switch, cells in rows.items():
        those = [point for point in points if str(point.switch_epoch or "never") == switch]
        assert cells[2] == str(len(those))
        assert cells[0].split(" to ")[0] == f"{min(point.tau for point in those):g}"
        assert cells[1].split(" to ")[-1] == f"{max(point.zeta for point in those):g}"
    assert len(printed(console.switch_map_table(points[:40])).splitlines()) == 44


def test_a_run_that_never_switched_or_froze_is_told_as_that():
    result = {"switch_epoch": 3, "freeze_epoch": None, "val_top1": 0.5, "best_val_top1": 0.625, "seconds": 1234.4}
    assert console.result_line(result) == "switch after epoch 3, no freeze, top-1 50.0% (best 62.5%), 1,234 s"


@pytest.mark.parametrize(
    ("epochs", "told"),
    [
        (1, "the record has 1 epoch of phase full, and 2 windows of 1 epoch take 2"),
        (2, "in the record's 2 epochs of phase full"),
    ],
)
def test_a_reason_counts_with_the_words_for_it(epochs: int, told: str):
    method = MethodSettings(windows=2, window_epochs=1, tau=0.0)
    record = Record([norms_line(epoch, {"blocks.0.mlp.fc1": 1.0}) for epoch in range(epochs)], method, ramp_epochs=0)
    assert told in (replay(record, method, 0).reason or "")
