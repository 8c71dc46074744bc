import json

import pytest
import yaml

from prelora_ray.config_file import parse_settings
from prelora_ray.run_folder import RunFolder, parse_lines
from prelora_ray.storage import Storage
from prelora_ray.train.no_effect import without_effect
from tests.lines import write_lines


def test_lines_survive_a_writer_that_was_killed(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"attempt": 0, "event": "a"}\n{"attempt": 0, "ev')
    folder = RunFolder(tmp_path)
    write_lines(folder, "events.jsonl", {"attempt": 1, "event": "b"})
    assert [line["event"] for line in folder.read_lines("events.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    "damage", [b'{"b" 2}', b'{"b": {"c": 2}', b"\0\0\0\0", b'\0\0{"b": 2}', b"\xff", b"7", b"[]", b"", b'"b": 2}']
)
def test_a_damaged_line_takes_no_other_with_it(damage):
    assert parse_lines(b'{"a": 1}\n' + damage + b'\n{"c": 3}\n') == [{"a": 1}, {"c": 3}]


def test_a_line_torn_behind_an_inner_brace_stays_by_itself(tmp_path):
    (tmp_path / "norms.jsonl").write_bytes(b'{"epoch": 0, "norms": {"a": 1}')
    write_lines(RunFolder(tmp_path), "norms.jsonl", {"epoch": 1}, {"epoch": 2})
    assert RunFolder(tmp_path).read_lines("norms.jsonl") == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"{", b"[1]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.yaml", "data.json", "ranks.json", "result.json"])
def test_a_damaged_file_is_told_in_a_sentence_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    folder = RunFolder(tmp_path)
    with pytest.raises(
        ValueError, match=r"is damaged \(.*\): restore it, or remove it and have the same command write it"
    ) as error:
        folder.read_settings() if name == "config.yaml" else folder.read_json(name)
    assert str(error.value).startswith(f"{tmp_path}/{name} is damaged")
    assert "\n" not in str(error.value)


def test_classes_that_are_not_there_are_told(tmp_path):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.json is damaged \(it names no classes\)"):
        RunFolder(tmp_path).read_classes()


def test_a_result_that_lacks_a_key_is_told(tmp_path):
    (tmp_path / "result.json").write_text('{"epochs": 3}')
    with pytest.raises(ValueError, match=r"result\.json is damaged \(it holds an object without 'switch_epoch'"):
        RunFolder(tmp_path).read_result()


def test_infinite_numbers_become_null(tmp_path):
    write_lines(Storage(tmp_path), "w.jsonl", {"change": {"query": float("inf"), "key": 1 / 3}, "list": [float("nan")]})
    text = (tmp_path / "w.jsonl").read_text()
    assert json.loads(text) == {"change": {"query": None, "key": 1 / 3}, "list": [None]}


def test_what_a_run_takes_over_from_another_is_not_said_to_have_no_effect(tmp_path):
    """Of a file that holds every key, what somebody changes in it is."""
    run = parse_settings({"name": "run", "data": {"path": "x"}, "method": {"r_max": 32}, "train": {"epochs": 90}})
    folder = RunFolder(tmp_path)
    folder.write_settings(run)
    assert folder.read_settings() == run
    full = folder.read_settings(["method.enabled=false", "method.r_min=4", ("train.adapters", "plain")])
    assert (full.method.r_min, full.method.r_max, full.train.epochs) == (4, 32, 90)
    assert without_effect(full) == [
        "method.r_min has no effect, as method.enabled is false",
        "train.adapters has no effect, as method.enabled is false",
    ]


@pytest.mark.parametrize(("rank_floor", "percent"), [(None, 0.0), (0, 0.1)])
def test_the_two_keys_of_the_rank_floor_are_read_as_one(tmp_path, rank_floor, percent):
    written = {
        "name": "run",
        "data": {"path": "x"},
        "method": {"rank_floor": rank_floor, "rank_floor_percent": 0.1, "tau": 1.0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    method = RunFolder(tmp_path).read_settings().method
    assert (method.rank_floor_percent, method.tau) == (percent, 1.0)


def test_a_run_from_before_the_form_of_drop_path_had_masks(tmp_path):
    written = {"name": "run", "data": {"path": "x"}, "model": {"drop_path": 0.1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    assert RunFolder(tmp_path).read_settings().model.drop_path_form == "mask"
