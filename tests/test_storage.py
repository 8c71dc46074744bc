"""A folder behaves alike on a disk and on S3."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prelora_ray.run_folder import LineWriter, RunFolder
from prelora_ray.storage import Storage, absolute, without_keys
from tests.command import prelora_here


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


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://NAME:hush@bucket/runs", "s3://...@bucket/runs"),
        ("s3://NAME:hu%2Fsh@bucket", "s3://...@bucket"),
        ("s3://NAME:hush/hush@bucket/a@b", "s3://...@b"),  # a secret may hold a slash or an @
        ("gs://name:hush@bucket/runs", "gs://...@bucket/runs"),
        ("s3://bucket?endpoint_override=https://name:hush@host", "s3://...@host"),
    ],
)
def test_an_address_that_holds_keys_is_refused_without_telling_them(uri, told):
    with pytest.raises(
        ValueError, match=f"^{re.escape(repr(told))} is not allowed: it must be an address without keys"
    ) as error:
        Storage(uri)
    assert "hush" not in str(error.value)
    assert without_keys(f"first {uri!r} and then {uri!r}") == f"first {told!r} and then {told!r}"


@pytest.mark.parametrize("uri", ["s3://bucket/a@b", "s3://bucket/10:30@noon", "gs://anonymous@bucket/x", "a:b@c"])
def test_other_addresses_hold_no_keys(uri):
    assert without_keys(uri) == uri


KEYS = "s3://NAME:hush@bucket/runs"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "jobs/configs/digits.yaml", "--storage", KEYS], "storage = "),
        (["train", "jobs/configs/digits.yaml", "--set", f"storag={KEYS}"], "storag = "),
        (["train", "jobs/configs/digits.yaml", "--set", f"data.path={KEYS}"], "data.path = "),
        (["train", "jobs/configs/digits.yaml", "--set", f"data.source={KEYS}"], "data.source = "),
        (["train", "jobs/configs/digits.yaml", "--set", f"model.init_from={KEYS}"], "model.init_from = "),
        (["sweep", "jobs/sweeps/digits.yaml", "--storage", KEYS], "storage = "),
        (["export", KEYS, "out"], ""),
        (["export", "run", KEYS], ""),
        (["report", KEYS], ""),
        (["replay", KEYS], ""),
        (["doctor", KEYS], ""),
    ],
)
def test_no_command_takes_an_address_that_holds_keys(arguments, name):
    """`prepare` and `evaluate` start Ray first, and take their folders as the others do."""
    result = prelora_here(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"prelora: {name}'s3://...@bucket/runs' is not allowed: ")
    assert "hush" not in result.stderr and len(result.stderr.splitlines()) == 1
