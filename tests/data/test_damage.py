"""Damaged prepared data is reported by file and row; an error that may pass by itself is not taken for damage."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Pass
from prelora_ray.data.damage import DamagedDataError
from prelora_ray.data.manifest import parse_manifest, read_manifest
from prelora_ray.data.rows import read_encoded
from prelora_ray.data.stream import stream_batches
from prelora_ray.errors import WorkError
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan
from tests.command import prelora_here

SHARD, ROW = "val-00000.parquet", 7


def overwrite(path: Path, row: int) -> str:
    """Spoils the stored image of a row, the file's size kept; returns what the row was made from."""
    stored = pq.read_table(path).slice(row, 1).to_pylist()[0]
    content = path.read_bytes()
    assert content.count(stored["image"]) == 1
    path.write_bytes(content.replace(stored["image"], stored["image"][:40].ljust(len(stored["image"]), b"x")))
    return stored["source"]


@pytest.fixture
def folder(digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits, tmp_path / "digits")


def stream(folder: Path, split: str = "val"):
    settings = parse_settings(
        {"name": "damage", "data": {"path": str(folder), "batch_size": 240, "cell": 24}, "model": {"image_size": 8}}
    )
    plan = stream_plan(settings, parse_manifest(Storage(folder)), 0, 1)
    return stream_batches(plan, [Pass(split, 0)], decoders=1)


def told(error: pytest.ExceptionInfo[DamagedDataError]) -> str:
    """The error's text, which is one line of the error as it was raised."""
    assert type(error.value) is DamagedDataError and isinstance(error.value, WorkError)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_image_that_does_not_decode_is_named(folder):
    source = overwrite(folder / SHARD, ROW)
    with pytest.raises(DamagedDataError) as error:
        list(stream(folder))
    assert told(error).startswith(f"{folder}/{SHARD}, row {ROW} ({source}): the stored image cannot be decoded: ")
    with pytest.raises(DamagedDataError) as error:
        read_encoded(str(folder), read_manifest(Storage(folder)).splits["val"], ROW + 1)
    assert f"{SHARD}, row {ROW} ({source})" in told(error)


def test_a_row_is_counted_from_its_own_shards_begin(folder, tmp_path):
    """Two shards of one folder as one split: a sample id goes on counting, a row does not."""
    source = overwrite(folder / SHARD, ROW)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"] = manifest["splits"]["train"] + manifest["splits"]["val"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedDataError, match=rf"{SHARD}, row {ROW} \({source}\)"):
        list(stream(folder))


def test_a_shard_that_was_cut_off_is_named(folder):
    size = os.path.getsize(folder / SHARD)
    batches = stream(folder)
    os.truncate(folder / SHARD, size // 2)
    with pytest.raises(DamagedDataError) as error:
        list(batches)
    assert told(error).startswith(f"{folder}/{SHARD} is damaged: it has {size // 2:,} bytes, and its manifest says {size:,}; ")


@pytest.mark.parametrize("what", ["gone", "unreadable"])
def test_a_share_that_is_away_is_no_damage(folder, what):
    batches = stream(folder)
    os.rename(folder / SHARD, folder / "elsewhere")
    if what == "unreadable":
        (folder / SHARD).mkdir()  # whose reading fails, whoever asks
    with pytest.raises(Exception, match=SHARD) as error:
        list(batches)
    assert not isinstance(error.value, DamagedDataError)


def test_what_fails_over_a_whole_shard_is_no_damage(folder, monkeypatch):
    """Such as a reader whose own memory or connection fails midway, the file being what it should be."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("503 Slow Down")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(OSError, match="503"):
        read_encoded(str(folder), read_manifest(Storage(folder)).splits["val"], 1)


def test_doctor_finds_every_damage_of_a_prepared_folder(folder):
    whole = prelora_here("doctor", str(folder), "--json")
    assert (whole.returncode, json.loads(whole.stdout)) == (0, {"path": str(folder), "findings": []})
    train = pq.ParquetFile(folder / "train-00000.parquet").metadata.num_rows
    sources = [overwrite(folder / "train-00000.parquet", row) for row in (0, train - 1)]
    os.truncate(folder / SHARD, 1000)
    result = prelora_here("doctor", str(folder), "--json")
    assert result.returncode == 1
    expected = [
        "train-00000.parquet is damaged: its SHA-256 is ",
        *(rf"train-00000.parquet, row {row} \({source}\): " for row, source in zip((0, train - 1), sources, strict=True)),
        f"{SHARD} is damaged: it has 1,000 bytes",
        f"{SHARD} is no whole Parquet file",
    ]
    findings = json.loads(result.stdout)["findings"]
    assert len(findings) == len(expected)
    assert all(re.match(f"{folder}/{start}", finding) for finding, start in zip(findings, expected, strict=True))
    plain = prelora_here("doctor", str(folder))
    assert (plain.returncode, plain.stdout.splitlines()) == (1, [*findings, f"{folder}: 5 findings"])


def test_doctor_finds_a_label_of_no_class_and_a_shard_that_is_not_there(folder):
    manifest = read_manifest(Storage(folder))
    (folder / "manifest.json").write_text(
        json.dumps({"schema": 2, **json.loads((folder / "manifest.json").read_text()), "classes": manifest.classes[:9]})
    )
    (folder / SHARD).unlink()
    findings = json.loads(prelora_here("doctor", str(folder), "--json").stdout)["findings"]
    nines = sum(label == 9 for label in pq.read_table(folder / "train-00000.parquet")["label"].to_pylist())
    assert sum(finding.endswith("its label is 9, and there are 9 classes") for finding in findings) == nines > 0
    assert findings[-1].startswith(f"{folder}/{SHARD} cannot be read: ") and len(findings) == nines + 1


def test_a_mended_shard_is_as_before(folder, digits):
    """What the sentence asks for: the file deleted and the folder prepared again."""
    from prelora_ray.data.prepare import prepare

    overwrite(folder / SHARD, ROW)
    (folder / SHARD).unlink()
    prepare("digits", str(folder))
    assert (folder / SHARD).read_bytes() == (digits / SHARD).read_bytes()
    assert prelora_here("doctor", str(folder)).returncode == 0


def test_a_manifest_without_a_split_is_told(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content["splits"]["val"]
    (folder / "manifest.json").write_text(json.dumps(content))
    result = prelora_here("doctor", str(folder))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "manifest.json is damaged: prepare the folder again" in result.stderr


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2}', '{"schema": 2, "classes": 5, "splits": {}, "bad": 0}'])
def test_a_damaged_manifest_is_told(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    result = prelora_here("doctor", str(tmp_path))
    assert (result.returncode, result.stderr.strip()) == (
        2,
        f"prelora: {tmp_path}/manifest.json is damaged: prepare the folder again",
    )


def test_what_is_neither_is_told(tmp_path):
    result = prelora_here("doctor", str(tmp_path))
    assert result.returncode == 2
    assert "is neither a prepared folder (it has no manifest.json) nor a run folder" in result.stderr
