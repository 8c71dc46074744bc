"""Lines that become objects and lines again, and what is read off them."""

from __future__ import annotations

import json
import runpy
from dataclasses import fields, replace
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
    gain_note,
    phase_summaries,
    rank_counts,
    standing,
    table_summaries,
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


def run_of(*epochs: tuple[str, float], waits: float = 0) -> list[EpochLine]:
    """Epochs of 60 images, each (phase, images/s), that wait for so many seconds."""
    return [
        epoch_line(epoch, phase=phase, images_per_second=rate, train_seconds=60 / rate, data_wait_seconds=waits)
        for epoch, (phase, rate) in enumerate(epochs)
    ]


def test_a_phase_is_summed_over_its_epochs():
    """By hand: the first epoch, with its waiting, counts in seconds alone."""
    lines = [
        epoch_line(0, train_seconds=9, seconds=10, data_wait_seconds=8, val_top1=0.25, peak_memory_bytes=9),
        epoch_line(1, train_seconds=3, seconds=4, data_wait_seconds=1, val_top1=None, peak_memory_bytes=8),
        epoch_line(2, train_seconds=1, seconds=2, data_wait_seconds=0, val_top1=None, peak_memory_bytes=8),
        epoch_line(3, phase="lora", trainable_parameters=1, parameters=4, val_top1=None, loss=0.5),
    ]
    full, lora = phase_summaries(lines).values()
    assert (full.phase, full.epochs, full.seconds, full.data_wait_fraction) == ("full", 3, 16, 0.25)
    assert (full.val_top1, full.peak_memory_bytes, full.trainable_fraction) == (0.25, 9, 1)
    assert (lora.phase, lora.loss, lora.val_top1, lora.trainable_fraction) == ("lora", 0.5, None, 0.25)


def test_a_phases_speed_is_that_behind_its_start():
    """By hand: 60 images at 5/s are 12 s, of which 6 s are what they take at 10/s; those of lora, 15 s, 12 at 5/s."""
    full, warmup, lora = phase_summaries(
        run_of(("full", 5), ("full", 9), ("full", 10), ("full", 30), ("warmup", 2), ("lora", 4), ("lora", 5))
    ).values()
    assert (full.images_per_second, full.against_full, full.startup_seconds) == (10, 1, 6)
    assert (warmup.images_per_second, warmup.against_full, warmup.startup_seconds) == (2, None, None)
    assert (lora.images_per_second, lora.against_full, lora.startup_seconds) == (5, 0.5, pytest.approx(3))


def test_the_first_epoch_of_an_attempt_starts_too():
    """Also after a restart in the middle of a phase, with fewer workers: speeds are compared by worker."""
    lines = run_of(("full", 2), ("full", 20), ("full", 1), ("full", 10), ("lora", 5), ("lora", 10))
    attempts = [0, 0, 1, 1, 1, 1]
    lines = [replace(line, attempt=a, world_size=2 - a) for line, a in zip(lines, attempts, strict=True)]
    full, lora = phase_summaries(lines).values()
    assert (full.images_per_second, lora.against_full) == (15, 1)
    # At 10/s a worker's 60 images take 6 s, and those of two 3 s.
    assert full.startup_seconds == pytest.approx(30 - 3 + 60 - 6)


def test_no_speed_gained_is_told_with_what_is_the_reason():
    slow = ("full", 5), ("full", 10), ("lora", 5), ("lora", 8)
    assert (
        gain_note(run_of(*slow)) == "phase lora trains 0.80 times as fast as full training: at this size freezing saves no time"
    )
    waits = "phase lora trains 0.80 times as fast as full training: it waits for images 40% of its time"
    assert gain_note(run_of(*slow, waits=3)) == waits
    assert gain_note(run_of(("full", 5), ("full", 10), ("lora", 5), ("lora", 12))) is None
    assert gain_note(run_of(*slow[:3])) is None  # an epoch that starts tells no speed
    assert gain_note(run_of(*slow[:2])) is None


def test_where_images_grew_a_table_tells_their_sizes_apart():
    lines = [
        epoch_line(epoch, phase=phase, image_size=size, images_per_second=size)
        for epoch, (phase, size) in enumerate([("full", 160), ("full", 160), ("full", 224), ("lora", 224)])
    ]
    told = {name: (summary.epochs, summary.images_per_second) for name, summary in table_summaries(lines).items()}
    assert told == {"full, 160 px": (2, 160), "full, 224 px": (1, 224), "lora, 224 px": (1, 224)}
    assert phase_summaries(lines)["full"].images_per_second == pytest.approx(3 / (2 / 160 + 1 / 224))
    assert table_summaries(lines[2:]) == phase_summaries(lines[2:])
    earlier = [replace(line, image_size=None) for line in lines[2:3]]  # as an earlier version wrote it
    assert list(table_summaries([*earlier, *lines[3:]])) == ["full", "lora"]


def test_ranks_are_counted_in_their_order():
    assert list(rank_counts({"a": 16, "b": 8, "c": 16, "d": 0}).items()) == [(0, 1), (8, 1), (16, 2)]


def test_the_tables_in_the_docs_are_up_to_date():
    docs = Path(__file__).parent.parent / "docs"
    page = runpy.run_path(str(docs / "make_records.py"))["page"]
    text = (docs / "run-folder.md").read_text()
    assert text == page(text), "run `python docs/make_records.py`"
    for record in (NormsLine, WindowLine, EpochLine, Progress, *EVENTS.values()):
        assert all(f"`{field.name}`" in text for field in fields(record))
