"""A folder behaves alike on a disk and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelora_ray.run_folder import LineWriter, RunFolder
from prelora_ray.storage import Storage


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_files_and_folders(folder):
    storage = Storage(folder) / "new"
    assert storage.list_files() == {}
    assert not storage.exists("a.json")
    storage.make()
    storage.write_bytes("a.json", b"1")
    storage.write_bytes("a.json", b"22")
    storage.write_json("sub/b.json", {"x": [1.5, None]})
    assert storage.exists("a.json")
    assert storage.read_bytes("a.json") == b"22"
    assert storage.list_files() == {"a.json": 2}
    assert storage.list_folders() == ["sub"]
    assert (storage / "sub").read_json("b.json") == {"x": [1.5, None]}
    storage.remove_folder("sub")
    assert storage.list_folders() == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("c.json")


def test_lines_are_appended_by_one_writer_after_the_other(folder):
    for attempt in (0, 1):
        writer = LineWriter(Storage(folder), "events.jsonl")
        writer.write(attempt=attempt, event="a")
        writer.write(attempt=attempt, event="b")
        writer.flush()
    run = RunFolder(folder)
    assert [(line["attempt"], line["event"]) for line in run.read_lines("events.jsonl")] == [
        (0, "a"),
        (0, "b"),
        (1, "a"),
        (1, "b"),
    ]
