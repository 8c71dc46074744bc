import json

import pytest

from prelora_ray.run_folder import LineWriter, RunFolder, last_attempt, parse_lines
from prelora_ray.storage import Storage


def test_lines_survive_a_writer_that_was_killed(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"attempt": 0, "event": "a"}\n{"attempt": 0, "ev')
    folder = RunFolder(tmp_path)
    LineWriter(folder, "events.jsonl").write(attempt=1, event="b")
    assert [line["event"] for line in folder.read_lines("events.jsonl")] == ["a", "b"]


def test_a_damaged_whole_line_is_an_error():
    with pytest.raises(ValueError, match="Expecting"):
        parse_lines(b'{"a": 1}\n{"b" 2}\n{"c": 3}\n')


def test_infinite_numbers_become_null(tmp_path):
    LineWriter(Storage(tmp_path), "w.jsonl").write(change={"query": float("inf"), "key": 1 / 3}, list=[float("nan")])
    text = (tmp_path / "w.jsonl").read_text()
    assert json.loads(text) == {"change": {"query": None, "key": 1 / 3}, "list": [None]}


def test_the_later_attempt_stands():
    lines = [
        {"attempt": 0, "epoch": 0, "loss": 1},
        {"attempt": 0, "epoch": 1, "loss": 2},
        {"attempt": 1, "epoch": 1, "loss": 3},
        {"attempt": 1, "epoch": 2, "loss": 4},
    ]
    assert [line["loss"] for line in last_attempt(reversed(lines), "epoch")] == [1, 3, 4]
