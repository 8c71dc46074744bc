"""The records of a run are read once, however many ask for them."""

from __future__ import annotations

from collections import Counter

from rich.live import Live

from prelora_ray.config_file import parse_settings
from prelora_ray.recorded.remarks import remarks_on
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import EpochLine, Event, NormsLine, Switch, WindowLine
from prelora_ray.report.facts import facts
from prelora_ray.report.page import _run_sections
from prelora_ray.report.records import ReportedRun
from prelora_ray.run_folder import RunFolder
from prelora_ray.terminal.console import result_table
from prelora_ray.terminal.live import _Watcher
from tests.lines import epoch_line, event, norms_line


class CountingFolder(RunFolder):
    """Counts how often each file is read."""

    def read_bytes(self, name: str) -> bytes:
        reads[name] += 1
        return super().read_bytes(name)


reads: Counter[str] = Counter()


def test_a_report_reads_every_file_once(tmp_path):
    reads.clear()
    folder = CountingFolder(tmp_path)
    folder.write_settings(parse_settings({"name": "run", "data": {"path": "x"}, "train": {"epochs": 9, "ramp_epochs": 1}}))
    folder.write_records(EpochLine, [epoch_line(epoch) for epoch in range(4)])
    folder.write_records(NormsLine, [norms_line(epoch, {"blocks.0.mlp.fc1": 1.0}) for epoch in range(4)])
    folder.write_records(Event, [event("run_started", world_size=1)])
    folder.write_json("data.json", {"classes": ["a", "b"]})
    run = ReportedRun(folder, "run")
    facts([run])
    _run_sections([run])
    remarks_on(run)
    result_table(run)
    files = (EpochLine.FILE, NormsLine.FILE, Event.FILE, "config.yaml", "data.json")
    assert {name: reads[name] for name in files} == dict.fromkeys(files, 1)
    assert reads[WindowLine.FILE] <= 1


def test_a_poll_of_the_live_view_reads_every_file_once(tmp_path):
    settings = parse_settings({"name": "run", "storage": str(tmp_path), "data": {"path": "x"}})
    watcher, folder = _Watcher(settings), CountingFolder(tmp_path / "run")
    watcher._folder = folder
    watcher._live = Live()  # which is never started
    folder.write_records(EpochLine, [epoch_line(epoch) for epoch in range(3)])
    folder.write_records(Event, [event("run_started", world_size=1)])
    reads.clear()
    watcher._show_new()
    assert reads[EpochLine.FILE] == reads[Event.FILE] == 1


def test_of_a_switch_that_a_restart_repeats_the_newest_stands(tmp_path):
    switches = [event("switch", 3, attempt=a, switch_epoch=3 + a, trainable_parameters=1, parameters=1) for a in (0, 1)]
    RunFolder(tmp_path).write_records(Event, switches)
    run = RunRecords(RunFolder(tmp_path))
    assert run.events_of(Switch) == switches and run.last_of(Switch) == switches[1]
