"""A folder behaves alike on a disk and on S3."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory

from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.resume_point import find_resume_point
from prelora_ray.run_folder import LineWriter, RecordWriter, RunFolder
from prelora_ray.storage import Storage, absolute, check_local, check_outlives_job, without_keys
from tests.command import prelora_here
from tests.lines import epoch_line, event


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_what_a_disk_alone_takes_may_be_given_as_its_uri(tmp_path):
    check_local(f"file://{tmp_path}/report.html")
    with pytest.raises(UserError, match=r"^'s3://bucket/report\.html' is not allowed: it must be on a disk$"):
        check_local("s3://bucket/report.html")


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


def test_what_killed_writers_left_is_removed(tmp_path):
    names = ["a.json", "a.json.tmp", "b.tmp", f"a.json.{'0af3' * 8}.tmp", f"kept.json.{'0af3' * 8}.tmp"]
    for name in names:
        (tmp_path / name).touch()
    Storage(tmp_path).remove_unfinished(but=["kept.json"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*names} - {names[3]})


def test_a_writer_that_is_killed_leaves_what_is_recognised(tmp_path, monkeypatch):
    left: list[str] = []
    monkeypatch.setattr(os, "replace", lambda temporary, _: left.append(temporary))
    Storage(tmp_path).write_bytes("a.json", b"1")
    assert [str(path) for path in tmp_path.iterdir()] == left
    Storage(tmp_path).remove_unfinished()
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_on_the_disk_when_its_file_is_written(tmp_path, monkeypatch):
    """Every folder that got a new name is synced after it got it, and the file before it gets its own."""
    synced: list[str] = []
    fsync = os.fsync
    seen = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), synced.append(seen(descriptor))))
    Storage(tmp_path / "run").write_bytes("sub/a.json", b"1")
    above, run, temporary, sub = synced
    assert (above, run, sub) == (str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run/sub"))
    assert temporary.startswith(f"{tmp_path}/run/sub/a.json.")


def test_a_file_share_that_syncs_no_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    Storage(tmp_path / "run").write_bytes("a.json", b"1")
    assert Storage(tmp_path / "run").read_bytes("a.json") == b"1"


def test_events_of_an_attempt_that_dies_soon_are_there(folder):
    """So that the next attempt takes the next number."""
    records = RecordWriter(RunFolder(folder))
    records.write(event("run_started", seed=0, world_size=2))
    records.write(epoch_line(0))
    records.flush_events()
    assert [line["event"] for line in RunFolder(folder).read_lines("events.jsonl")] == ["run_started"]
    start, _ = find_resume_point(RunFolder(folder), Checkpoints(RunFolder(folder)))
    assert start.attempt == 1


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


def test_an_address_of_an_unknown_kind_is_a_users_mistake():
    with pytest.raises(UserError, match=r"^'foo://x' is no folder or bucket: Unrecognized filesystem type"):
        Storage("foo://x")


@pytest.mark.parametrize("path", ["/mnt/runs", "s3://bucket/runs", "/home/_ray_pkg_/runs"])
def test_what_outlives_a_job_is_allowed(path):
    check_outlives_job(path)


@pytest.mark.parametrize("inside", ["", "/runs/digits"])
def test_what_ends_with_a_job_is_refused(tmp_path, inside):
    """In a folder that has the name which Ray itself gives to what it uploads."""
    package = get_uri_for_directory(str(tmp_path), include_gitignore=True).removeprefix("gcs://").removesuffix(".zip")
    with pytest.raises(UserError, match="is not allowed in a job: a relative path lies in what Ray uploaded for it"):
        check_outlives_job(f"/tmp/ray/session/runtime_resources/working_dir_files/{package}{inside}")


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (["--out", "/tmp/r.html"], "is no run folder"),
        (["--out", "r.html"], "is not allowed in a job"),
        (["--out", "/tmp/r.html", "--plotly", "p.js"], "is not allowed in a job"),
    ],
)
def test_a_job_may_write_a_report_outside_of_what_ray_uploaded(tmp_path, places, told):
    """From there, of a run that there is not: whether it is the place that is refused."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "prelora_ray", "report", "/nowhere/run", *places]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2 and told in result.stderr, result.stderr
