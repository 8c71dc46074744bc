"""A folder behaves alike on a disk and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelora_ray.run_folder import LineWriter, RunFolder
from prelora_ray.storage import Storage, absolute


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


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("data", "{here}/data"),
        ("a/../data/", "{here}/data"),
        ("~/data", "{home}/data"),
        ("file:///mnt/data", "/mnt/data"),
        ("file://~/data", "{home}/data"),
        ("/mnt/data", "/mnt/data"),
        ("s3://bucket/data", "s3://bucket/data"),
        ("gs://bucket/a/../data", "gs://bucket/a/../data"),
    ],
)
def test_a_path_means_the_same_to_a_process_in_another_folder(name, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    place = place.format(here=tmp_path, home=tmp_path / "home")
    assert absolute(name) == place
    if not name.startswith(("s3:", "gs:")):
        handed_over, below = str(Storage(name)), str(Storage(name) / "below")
        monkeypatch.chdir("/")
        assert Storage(handed_over).path == place
        assert (below, Storage(below).path) == (f"{place}/below", f"{place}/below")


def test_dots_after_a_link_mean_what_the_disk_says(tmp_path, monkeypatch):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    monkeypatch.chdir(tmp_path)
    assert absolute("link/../data") == str(tmp_path / "far" / "data")
    assert absolute("link/data") == str(tmp_path / "link" / "data")


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
