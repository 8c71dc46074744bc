"""What a person sees is what was said: no text is taken for markup."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from prelora_ray import console
from prelora_ray.config_file import parse_settings
from prelora_ray.engine.evaluation import Evaluation
from prelora_ray.inference.evaluate import EvaluationReport
from tests.lines import event

TEXT = "runs/[old]/:x: [/bold] [red]"
REPORT = EvaluationReport(Evaluation(loss=1.0, top1=0.5, top5=1.0, images=2), (TEXT, "b"), torch.tensor([[0, 1], [1, 0]]))
SWEEP = {
    "path": TEXT,
    **{"unit": "CPU-hours", "pareto": [], "controls": []},
    "full": {"cost": 1.0, "val_top1": 0.5, "trial": "trunk"},
    "settings": [
        {
            **{"setting": {"method.freeze": "all"}, "switch_epoch": 1, "trainable_fraction": 0.1, "cost": 1.0},
            **{"val_top1": None, "ended": "failed", "diagnosis": [], "trial": "t", "message": TEXT},
        }
    ],
}
BENCH = {"benchmark": TEXT, "device": "cpu", "date": "today", "rows": [{"name": TEXT}]}


def printed(what: Any) -> str:
    with console.out.capture() as capture:
        console.out.print(what)
    return capture.get()


@pytest.mark.parametrize(
    ("shown", "times"),
    [
        (lambda: TEXT, 1),
        (lambda: console.result_table(TEXT, []), 1),
        (lambda: console.sweep_table(SWEEP), 2),
        (lambda: console.classes_table(REPORT), 1),
        (lambda: console.confusion_table(REPORT), 2),
        (lambda: console.bench_table(BENCH), 2),
    ],
    ids=["line", "run", "sweep", "classes", "confusion", "bench"],
)
def test_names_and_paths_are_shown_as_they_are(shown: Callable[[], Any], times: int):
    assert printed(shown()).count(TEXT) == times


def test_a_bar_and_a_runs_events_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path):
    terminal = Console(**console._PLAIN, force_terminal=True, width=160, file=io.StringIO())
    monkeypatch.setattr(console, "err", terminal)
    with console.progress(TEXT) as show:
        show(1, 2)
    assert TEXT in terminal.file.getvalue()
    watcher = console._Watcher(parse_settings({"name": "run", "storage": str(tmp_path), "data": {"path": "x"}}))
    told = watcher._event(event("diagnosis", signature="early_switch", value=1.0, limit=0.0, message=TEXT))
    assert printed(told).strip() == TEXT
    switch = watcher._event(event("switch", 3, switch_epoch=3, trainable_parameters=5, parameters=9))
    assert printed(switch).strip() == "switch after epoch 3: adapters join, 5 parameters train"
    late = watcher._event(event("switch", 3, switch_epoch=3, rate_left=0.0094, trainable_parameters=5, parameters=9))
    assert printed(late).startswith("switch after epoch 3 with 0.9% of the learning rate's sum left: adapters join")


def test_a_run_that_never_switched_or_froze_is_told_as_that():
    result = {"switch_epoch": 3, "freeze_epoch": None, "val_top1": 0.5, "best_val_top1": 0.625, "seconds": 1234.4}
    assert console.result_line(result) == "switch after epoch 3, no freeze, top-1 50.0% (best 62.5%), 1,234 s"
