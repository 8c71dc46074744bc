"""What a person sees of a run that goes on: on a terminal and in a log."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import EpochLine, Progress, Starting, WindowLine, to_json
from prelora_ray.run_folder import RunFolder
from prelora_ray.terminal import console, live
from tests.command import ROOT
from tests.lines import epoch_line, event, progress
from tests.terminal.test_console import TEXT, printed

EPOCHS = 12
METHOD = {"tau": 1.0, "zeta": 5.0, "windows": 3, "window_epochs": 1, "r_max": 8}


def run(tmp_path: Path) -> Settings:
    train = {"epochs": EPOCHS, "ramp_epochs": 2}
    content = {"name": "run", "storage": str(tmp_path), "data": {"path": "x"}, "train": train, "method": METHOD}
    return parse_settings(content)


def window(number: int, change: dict[str, float | None], loss_change: float, **content: object) -> WindowLine:
    line = {"attempt": 0, "phase": "full", "window": number, "epoch_end": number + 1, "loss": 1.0, "converged": False}
    return WindowLine(**{**line, "change": change, "loss_change": loss_change, "in_ramp": False, **content})


def write(folder: RunFolder, *lines: EpochLine | WindowLine) -> None:
    for kind in (EpochLine, WindowLine):
        folder.write_records(kind, [line for line in lines if isinstance(line, kind)])


def shown(settings: Settings) -> str:
    folder = RunFolder.of(settings)
    return printed(live.view(settings, RunRecords(folder), folder.read_place()))


def test_a_runs_events_are_shown_as_they_are(tmp_path):
    watcher, records = live._Watcher(run(tmp_path)), RunRecords(RunFolder(tmp_path))
    told = watcher._event(event("diagnosis", signature="early_switch", value=1.0, limit=0.0, message=TEXT), records)
    assert printed(told).strip() == TEXT
    switch = watcher._event(event("switch", 3, switch_epoch=3, trainable_parameters=5, parameters=9), records)
    assert printed(switch).strip() == "switch after epoch 3: adapters join, 5 parameters train"
    began = watcher._event(event("run_started", world_size=1), records)
    assert printed(began).strip() == "run started with 1 worker, phase full"


def test_where_it_is_how_long_it_takes_and_how_good_it_is(tmp_path):
    """Five of twelve epochs at 60 s each, and a half of the sixth: 6.5 minutes are left."""
    settings = run(tmp_path)
    folder = RunFolder.of(settings)
    tops = (0.25, 0.5, 0.75, 0.625, None)
    write(folder, *(epoch_line(epoch, val_top1=top1, seconds=60) for epoch, top1 in enumerate(tops)))
    now = Progress(**{**asdict(progress(5)), "batch": 5, "batches": 10, "time": 1.0})
    folder.write_json(Progress.FILE, to_json(now))
    assert "full  epoch 6 of 12  loss 1  top-1 62.5% (best 75.0%)  1 images/s  0:06:30 left" in shown(settings)


def test_the_strip_has_each_phase_as_long_as_it_was(tmp_path):
    settings = run(tmp_path)
    phases = ["full"] * 6 + ["warmup"] * 2 + ["lora"]
    write(RunFolder.of(settings), *(epoch_line(epoch, phase=phase) for epoch, phase in enumerate(phases)))
    place = Progress(**{**asdict(progress(9)), "phase": "lora"})
    RunFolder.of(settings).write_json(Progress.FILE, to_json(place))
    strip = next(line for line in shown(settings).splitlines() if "█" in line)
    each = live._STRIP // EPOCHS
    assert strip.startswith("█" * 6 * each + "▓" * 2 * each + "▒" * 2 * each + "·" * 2 * each)
    assert strip.endswith("█ full 6, ▓ warmup 2, ▒ lora 2 of 12 epochs")


def test_the_test_is_shown_against_its_thresholds(tmp_path):
    settings = run(tmp_path)
    changes = [({"query": 3.0, "fc1": 0.5}, 9.0), ({"query": 0.1, "fc1": 1.0}, 5.0), ({"query": 0.1, "fc1": None}, 5.0)]
    for count, rows in ((2, {"query": "1 of 2", "fc1": "0 of 2", "loss": "1 of 2"}),
                        (3, {"query": "2 of 2", "fc1": "0 of 2", "loss": "2 of 2"})):  # fmt: skip
        windows = [window(number + 2, *change) for number, change in enumerate(changes[:count])]
        write(RunFolder.of(settings), *windows)
        lines = {line.split()[0]: line for line in shown(settings).splitlines() if "steps" in line}
        assert {name: line[line.index(" of ") - 1 :][:6] for name, line in lines.items()} == rows
    assert "0.1 % (tau 1)" in lines["query"] and "inf % (tau 1)" in lines["fc1"] and "5 % (zeta 5)" in lines["loss"]
    marks = {name: line[line.index("|") - live._BAR // 2 :] for name, line in lines.items()}
    assert not re.match("━", marks["query"]), "a tenth of tau is the bar's left end"
    assert marks["fc1"].startswith("━" * 12 + "|" + "━" * 12)
    assert marks["loss"].startswith("━" * 12 + "|" + " " * 12), "the bar of what equals its threshold ends at it"


def test_steps_of_a_start_are_lines_of_a_log(tmp_path, monkeypatch):
    """Each once; and no more once it trains."""
    log = Console(**console._PLAIN, width=160, file=io.StringIO())
    monkeypatch.setattr(console, "err", log)
    watcher = live._Watcher(run(tmp_path))
    folder = RunFolder.of(run(tmp_path))
    for doing in ("start Ray", "place the workers"):
        folder.write_starting(doing)
        watcher._show_new()
        watcher._show_new()
    folder.write_json(Progress.FILE, to_json(Progress(**{**asdict(progress(0)), "time": 2e10})))
    watcher._show_new()
    assert log.file.getvalue() == "starting: start Ray\nstarting: place the workers\n"


def test_a_start_is_shown_with_what_each_step_took(tmp_path):
    settings = run(tmp_path)
    steps = [Starting(time=100.0, doing="start Ray"), Starting(time=106.0, doing="place the workers")]
    text = printed(live.view(settings, RunRecords(RunFolder.of(settings)), steps[-1], steps))
    assert text.startswith("starting: start Ray 6 s, place the workers ")


SCRIPT = """
import logging, sys, time, warnings
from prelora_ray import cli
from prelora_ray.config_file import parse_settings
from prelora_ray.terminal import live

logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[cli._StandardError()])
with live.watch(parse_settings({"name": "run", "storage": sys.argv[1], "data": {"path": "x"}})):
    for number in range(3):
        time.sleep(0.4)
        logging.getLogger("prelora_ray").info("line %d of the log", number)
"""


def test_lines_of_the_log_stand_by_themselves_on_a_terminal(tmp_path):
    RunFolder(tmp_path / "run").write_starting("start Ray")
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stderr=slave, stdout=slave, env=environment)
    os.close(slave)
    output = b""
    while True:
        try:
            output += os.read(master, 4096)
        except OSError:  # its end
            break
    assert process.wait() == 0, output.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    lines = re.split(r"[\r\n]+", plain)
    assert [line for line in lines if "of the log" in line] == [f"line {number} of the log" for number in range(3)]
    assert any(line.startswith("starting: start Ray") for line in lines)
