"""`prelora doctor` over a run folder; tests/data/test_damage.py has prepared folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prelora_ray.config_file import parse_settings
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.records import to_json
from prelora_ray.run_folder import RunFolder
from tests.command import prelora_here
from tests.fault_tolerance.test_checkpoint import checkpoint
from tests.lines import epoch_line, write_lines

NEWEST = "checkpoints/00002-000000"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path)
    folder.write_settings(parse_settings({"name": "run", "data": {"path": "data"}}))
    folder.write_json("data.json", {"classes": ["cat", "dog"]})
    write_lines(folder, "epochs.jsonl", *(to_json(epoch_line(attempt)) for attempt in (0, 1)))
    for epoch in (1, 2):
        Checkpoints(folder).save(checkpoint(epoch))
    return tmp_path


def findings(path: Path) -> list[str]:
    result = prelora_here("doctor", str(path), "--json")
    content = json.loads(result.stdout)
    assert content["path"] == str(path) and result.returncode == (1 if content["findings"] else 0)
    return content["findings"]


def test_a_whole_run_and_one_whose_writers_were_killed(run):
    (run / "stop.json").touch()  # of a driver that was killed while it stopped
    assert findings(run) == []
    with open(run / "epochs.jsonl", "a") as file:
        file.write('{"attempt": 1, "epo')
    (run / "checkpoints" / "00003-000000").mkdir()
    (run / "checkpoints" / "00003-000000" / "state.json").write_text('{"epo')
    assert findings(run) == []


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (f"{NEWEST}/model.safetensors", ": checkpoint 00002-000000 is damaged: model.safetensors has "),
        (f"{NEWEST}/state.json", ": checkpoint 00002-000000 is damaged: state.json has "),
        (f"{NEWEST}/manifest.json", ": checkpoint 00002-000000 is damaged: "),
        ("checkpoints/base.safetensors", ": checkpoint 00001-000000 is damaged: base.safetensors has "),
        ("epochs.jsonl", "/epochs.jsonl cannot be read: line 1 is no JSON: "),
        ("data.json", "/data.json cannot be read: "),
        ("config.yaml", "/config.yaml cannot be read: "),
    ],
)
def test_damage_of_any_file_is_found(run, file, told):
    content = bytearray((run / file).read_bytes())
    content[3] ^= 0xFF
    (run / file).write_bytes(content)
    found = findings(run)
    assert len(found) == (2 if "base" in file else 1)
    assert found[0].startswith(f"{run}{told}") and "\n" not in found[0]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("5", "line 3 is no object"),
        ('{"epoch": 2}', "line 3 holds an object without 'attempt', which it must have: {'epoch': 2}"),
    ],
)
def test_a_line_of_another_kind_is_found(run, line, told):
    with open(run / "epochs.jsonl", "a") as file:
        file.write(line + "\n")
    assert findings(run) == [f"{run}/epochs.jsonl cannot be read: {told}"]


def test_a_checkpoint_is_no_run(run):
    result = prelora_here("doctor", str(run / NEWEST))
    assert (result.returncode, result.stdout) == (2, "")
    assert "is neither a prepared folder" in result.stderr
