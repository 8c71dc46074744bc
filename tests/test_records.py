"""Lines that become objects and lines again."""

from __future__ import annotations

import json
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from prelora_ray.records import (
    EVENTS,
    EpochLine,
    Event,
    NormsLine,
    Progress,
    Restart,
    Switch,
    WindowLine,
    from_json,
    standing,
    to_json,
)
from prelora_ray.run_folder import RunFolder
from tests.lines import epoch_line

NORMS = '{"attempt": 0, "epoch": 3, "phase": "full", "loss": 2.5, "norms": {"blocks.0.mlp.fc1": 1.5}}'
SWITCH = (
    '{"attempt": 1, "time": 5.5, "event": "switch", "epoch": 3, "step": 45, "phase": "warmup", "switch_epoch": 3, '
    '"rate_left": 0.25, "trainable_parameters": 7, "parameters": 9, "format": "bf16", "logit_change": null}'
)
PROGRESS = (
    '{"attempt": 0, "time": 5.5, "epoch": 1, "batch": 2, "batches": 15, "step": 17, "phase": "full", "loss": null, '
    '"images_per_second": 3.5}'
)


@pytest.mark.parametrize(("kind", "line"), [(NormsLine, NORMS), (Event, SWITCH), (Progress, PROGRESS)])
def test_a_line_is_written_as_it_was_read(kind, line):
    assert json.dumps(to_json(from_json(kind, json.loads(line), "file"))) == line


def test_an_event_is_one_of_its_kind():
    switch = from_json(Event, json.loads(SWITCH), "events.jsonl")
    assert isinstance(switch, Switch) and (switch.switch_epoch, switch.logit_change) == (3, None)


def test_what_a_later_version_writes_is_passed_over():
    assert from_json(NormsLine, {**json.loads(NORMS), "gradients": {}}, "norms.jsonl").epoch == 3
    strange = {"attempt": 0, "time": 1.0, "event": "eclipse", "epoch": 1, "step": 2, "phase": "full", "moon": 1}
    event = from_json(Event, strange, "events.jsonl")
    assert type(event) is Event and event.event == "eclipse"


def test_what_an_earlier_version_did_not_write_has_a_default():
    line = to_json(epoch_line(0))
    del line["gradient_bytes"]
    assert from_json(EpochLine, line, "epochs.jsonl").gradient_bytes == 0
    old = {"attempt": 1, "time": 1.0, "event": "restart", "epoch": 1, "phase": "full", "cause": "stop", "world_size": 2}
    event = from_json(Event, old, "events.jsonl")
    assert isinstance(event, Restart) and event.reservation is None


@pytest.mark.parametrize(("kind", "line", "key"), [(NormsLine, NORMS, "norms"), (Event, SWITCH, "switch_epoch")])
def test_a_line_that_lacks_a_key_is_told_and_passed_over(tmp_path, kind, line, key):
    content = json.loads(line)
    del content[key]
    with pytest.raises(ValueError, match=rf"^file holds an object without '{key}', which it must have: ") as told:
        from_json(kind, content, "file")
    assert "\n" not in str(told.value)
    (tmp_path / kind.FILE).write_text(f"{json.dumps(content)}\n{line}\n")
    assert RunFolder(tmp_path).records(kind) == [from_json(kind, json.loads(line), "file")]


def test_every_kind_of_event_has_a_name_of_its_own():
    assert len(EVENTS) == len(Event.__subclasses__()) == 16
    assert all(name == kind.event for name, kind in EVENTS.items())


def test_the_later_attempt_stands():
    lines = [
        epoch_line(epoch, attempt=attempt, loss=loss) for attempt, epoch, loss in ((0, 0, 1), (0, 1, 2), (1, 1, 3), (1, 2, 4))
    ]
    assert [line.loss for line in standing(reversed(lines), lambda line: line.epoch)] == [1, 3, 4]


def test_a_folder_gives_the_lines_that_stand(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.epochs() == folder.windows() == folder.norms() == folder.events() == []
    lines = [epoch_line(0), epoch_line(1, loss=2), epoch_line(1, attempt=1, loss=3)]
    folder.write_records(EpochLine, lines)
    assert folder.records(EpochLine) == lines
    assert folder.epochs() == [lines[0], lines[2]]


def test_the_tables_in_the_docs_are_up_to_date():
    docs = Path(__file__).parent.parent / "docs"
    page = runpy.run_path(str(docs / "make_records.py"))["page"]
    text = (docs / "run-folder.md").read_text()
    assert text == page(text), "run `python docs/make_records.py`"
    for record in (NormsLine, WindowLine, EpochLine, Progress, *EVENTS.values()):
        assert all(f"`{field.name}`" in text for field in fields(record))
