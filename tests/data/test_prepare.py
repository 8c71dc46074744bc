from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prelora_ray.data.encode import BadImageError
from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.prepare import PrepareError, plan, prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.sources import open_source
from prelora_ray.errors import UserError
from prelora_ray.options import options_of
from prelora_ray.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def rows(folder: Path, split: str) -> list[dict]:
    manifest = read_manifest(Storage(folder))
    return [row for shard in manifest.splits[split] for row in pq.read_table(folder / shard.file).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a prepared folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def save(path: Path, value: int, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path, kind)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """30 images in 3 classes, with names that need care."""
    for i in range(30):
        save(tmp_path / "tree" / ("Zebra", "ape", "ünï cödé")[i % 3] / f"{'ab c'[i % 4]}_{i}.jpeg", i, kind="PNG")
    (tmp_path / "tree" / "ape" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "tree" / "notes.txt").write_text("not an image, in no class")
    return tmp_path / "tree"


def test_digits(digits: Path):
    manifest = read_manifest(Storage(digits))
    assert manifest.num_images("train") + manifest.num_images("val") == 1797
    assert manifest.classes == tuple("0123456789")
    numbers = [int(row["source"]) for split in ("train", "val") for row in rows(digits, split)]
    assert sorted(numbers) == list(range(1797))
    share = Counter(row["label"] for row in rows(digits, "val"))
    total = share + Counter(row["label"] for row in rows(digits, "train"))
    assert all(abs(share[label] - 0.2 * total[label]) <= 0.5 for label in range(10))  # stratified
    labels = [row["label"] for row in rows(digits, "train")]
    assert all(len(set(labels[i : i + 50])) > 5 for i in range(0, 1400, 50))  # shuffled


def test_one_tree(tree: Path, tmp_path: Path):
    manifest = prepare(str(tree), str(tmp_path / "out"), PrepareSettings(val_fraction=0.3, shard_rows=7))
    assert manifest.classes == ("Zebra", "ape", "ünï cödé")  # code points, as torchvision's ImageFolder sorts
    assert (manifest.num_images("train"), manifest.num_images("val"), manifest.bad) == (21, 9, 0)
    for row in rows(tmp_path / "out", "train") + rows(tmp_path / "out", "val"):
        assert row["image"] == (tree / row["source"]).read_bytes()  # small RGB PNGs are left untouched
        assert manifest.classes[row["label"]] == row["source"].split("/")[0]
    assert Counter(row["label"] for row in rows(tmp_path / "out", "val")) == {0: 3, 1: 3, 2: 3}


def test_train_and_val_trees(tmp_path: Path):
    for split, n in (("train", 8), ("val", 4)):
        for i in range(n):
            save(tmp_path / "tree" / split / "ab"[i % 2] / f"{i}.png", i + 100 * (split == "val"))
    manifest = prepare(str(tmp_path / "tree"), str(tmp_path / "out"))
    assert (manifest.num_images("train"), manifest.num_images("val")) == (8, 4)
    assert {row["source"] for row in rows(tmp_path / "out", "val")} == {f"val/{'ab'[i % 2]}/{i}.png" for i in range(4)}


def test_same_bytes_again_and_done_shards_are_kept(tree: Path, tmp_path: Path):
    settings = PrepareSettings(shard_rows=7)
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(str(tree), str(one), settings)
    # A job that was killed: one shard whole, one cut off, one missing, no manifest.
    shutil.copytree(one / "parts", two / "parts")
    names = sorted(path.name for path in one.glob("*.parquet"))
    (two / names[0]).write_bytes((one / names[0]).read_bytes())
    (two / names[1]).write_bytes((one / names[1]).read_bytes()[:-20])
    with pytest.raises(ValueError, match="no prepared folder"):
        read_manifest(Storage(two))
    kept = (two / names[0]).stat().st_ino
    prepare(str(tree), str(two), settings)
    assert contents(one) == contents(two)
    assert (two / names[0]).stat().st_ino == kept
    # Other settings make other shards.
    prepare(str(tree), str(two), PrepareSettings(shard_rows=7, seed=1))
    assert (two / names[0]).read_bytes() != (one / names[0]).read_bytes()


def test_broken_images_are_counted_and_named(tree: Path, tmp_path: Path):
    whole = next((tree / "ape").glob("*.jpeg"))
    (tree / "ape" / "cut.png").write_bytes(whole.read_bytes()[:-30])
    (tree / "Zebra" / "empty.jpg").write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(PrepareError, match=r"2 of 32 images .* more than --max-bad 0\.05"):
        prepare(str(tree), str(out), PrepareSettings(max_bad=0.05))
    assert not (out / "manifest.json").exists()
    manifest = prepare(str(tree), str(out), PrepareSettings(max_bad=0.07))
    assert manifest.bad == 2
    assert manifest.num_images("train") + manifest.num_images("val") == 30
    listed = {entry["image"]: entry["reason"] for entry in json.loads((out / "bad.json").read_text())}
    assert set(listed) == {"ape/cut.png", "Zebra/empty.jpg"}
    assert "truncated" in listed["ape/cut.png"]


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "schema"])
def test_damaged_folders_are_refused(tree: Path, tmp_path: Path, damage: str):
    out = tmp_path / "out"
    prepare(str(tree), str(out))
    shard, manifest = out / "train-00000.parquet", out / "manifest.json"
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    else:
        manifest.write_text(manifest.read_text().replace('"schema": 2', '"schema": 99'))
    with pytest.raises(ValueError, match=r"missing|bytes|damaged|schema version 99") as error:
        read_manifest(Storage(out))
    assert str(out) in str(error.value)


def test_refused_requests(tree: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is no source: give `digits`, a folder of images"):
        prepare(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--val-fraction 0\.01 leaves no images to validate with"):
        prepare(str(tree), str(tmp_path / "out"), PrepareSettings(val_fraction=0.01))
    for key, value in (("val_fraction", 1.0), ("size", 0), ("quality", 101), ("max_bad", 2), ("max_overlap", -1), ("seed", -1)):
        with pytest.raises(UserError, match=f"^--{key.replace('_', '-')} {value} is not allowed: it must be [a-z]* than "):
            options_of(PrepareSettings)(lambda settings: None)(**{key: value})
    assert not (tmp_path / "out").exists()


def test_a_refused_request_leaves_what_is_there(tree: Path, tmp_path: Path):
    out = tmp_path / "out"
    prepare(str(tree), str(out))
    before = contents(out)
    for source, settings in (
        (tmp_path / "nowhere", PrepareSettings()),
        (tree, PrepareSettings(val_fraction=0.01)),
        (tree, PrepareSettings(train_split="nosuch")),
    ):
        with pytest.raises(ValueError, match=r"is no source|is not allowed|leaves no images"):
            prepare(str(source), str(out), settings)
        assert contents(out) == before


def test_the_same_image_in_two_classes_is_told(tree: Path, tmp_path: Path):
    for name in ("ape", "Zebra"):
        for i in range(2):
            save(tree / name / f"same {i}.png", 200 + i)
    save(tree / "ape" / "same once more.png", 200)  # in one class twice
    manifest = prepare(str(tree), str(tmp_path / "out"), PrepareSettings(max_overlap=1))
    assert manifest.counts.notes[-1].startswith("2 images are there under another class too: '")
    told = manifest.counts.notes[-1].split(": ", 1)[1].split(", ")
    for pair in told:
        one, other = pair.split(" is ")
        for text in (one, other):
            name, label = text.split(" of ")
            assert name.strip("'").split("/")[0] == label.strip("'")
        assert (tree / one.split("'")[1]).read_bytes() == (tree / other.split("'")[1]).read_bytes()


def test_counts_add_up_and_are_kept(tree: Path, tmp_path: Path):
    (tree / "ape" / "cut.jpg").write_bytes(b"no image")
    (tree / "ape" / "raw.dng").write_bytes(b"no image that Pillow knows")
    (tree / "Zebra" / "notes.txt").write_text("no image, and does not say so")
    (tree / "Zebra" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    manifest = prepare(str(tree), str(tmp_path / "out"), PrepareSettings(max_bad=0.1))
    counts = read_manifest(Storage(tmp_path / "out")).counts
    assert counts == manifest.counts
    assert counts.classes == {"train": (8, 8, 8), "val": (2, 2, 2)}
    assert {(skip.reason, skip.ending): skip.count for skip in counts.skipped} == {
        ("in no class folder", ".txt"): 1,
        ("no image", ".txt"): 1,
        ("unreadable", ".jpg"): 2,
        ("unreadable", ".dng"): 1,
    }
    assert counts.seen == 35 == 30 + sum(skip.count for skip in counts.skipped)
    assert manifest.bad == 3
    assert counts.notes == (
        "read as image folders",
        "0.2 of each class is held out, as no images are there to validate with",
    )


def test_a_class_without_a_readable_image_is_refused(tree: Path, tmp_path: Path):
    for name in ("1.heic", "2.heic"):
        save(tree / "eel" / name, 0)
        (tree / "eel" / name).write_bytes(b"no image")
    with pytest.raises(PrepareError, match="no training image of class 'eel' that can be read"):
        prepare(str(tree), str(tmp_path / "out"), PrepareSettings(max_bad=0.5))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_images_in_both_splits_are_told_and_refused(tmp_path: Path):
    for split, first in (("train", 0), ("val", 18)):
        for i in range(first, first + 20):
            save(tmp_path / "tree" / split / "ab"[i % 2] / f"{split} {i}.png", i)
    with pytest.raises(PrepareError, match=r"2 of 20 validation images .* 'val/a/val 18.png' is 'train/a/train 18.png'"):
        prepare(str(tmp_path / "tree"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepare(str(tmp_path / "tree"), str(tmp_path / "out"), PrepareSettings(max_overlap=0.1))
    assert manifest.counts.in_both == 2
    assert "2 of 20 validation images are among the training images too" in manifest.counts.notes[-1]


def test_a_mended_image_is_taken_up(tree: Path, tmp_path: Path):
    whole, out = (tree / "ape" / "cut.png"), tmp_path / "out"
    whole.write_bytes(b"\x89PNG cut off")
    settings = PrepareSettings(shard_rows=7, max_bad=0.1)
    prepare(str(tree), str(out), settings)
    assert (out / "bad.json").exists()
    before = contents(out)
    save(whole, 77)
    manifest = prepare(str(tree), str(out), settings)
    assert (manifest.bad, manifest.counts.seen) == (0, 32)
    assert not (out / "bad.json").exists()
    stored = {row["source"]: row["image"] for split in ("train", "val") for row in rows(out, split)}
    assert stored["ape/cut.png"] == whole.read_bytes()
    changed = [name for name, content in contents(out).items() if name.endswith("parquet") and before[name] != content]
    assert len(changed) == 1  # the others were kept
    for value in (78, 79):  # a good one by another of the same name and size
        save(tree / "ape" / "good.png", value)
        prepare(str(tree), str(out), settings)
        stored = {row["source"]: row["image"] for split in ("train", "val") for row in rows(out, split)}
        assert stored["ape/good.png"] == (tree / "ape" / "good.png").read_bytes()


def test_bad_images_do_not_change_the_bytes(tree: Path, tmp_path: Path):
    (tree / "ape" / "text.jpg").write_bytes(b"no image")
    for name in ("one", "two"):
        prepare(str(tree), str(tmp_path / name), PrepareSettings(max_bad=0.1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_it_has_written_is_no_source(tree: Path, tmp_path: Path):
    """Into a folder inside the source, twice, and once more beside the first."""
    for out in (tree / "out", tree / "out", tree / "other"):
        manifest = prepare(str(tree), str(out))
        assert manifest.classes == ("Zebra", "ape", "ünï cödé")
        assert manifest.counts.seen == 31
    (tree / "out" / "manifest.json").unlink()  # as a killed job leaves it
    assert prepare(str(tree), str(tree / "out")).counts.seen == 31
    with pytest.raises(ValueError, match="is the source itself"):
        prepare(str(tree), str(tree))
    again = prepare(str(tree / "out"), str(tmp_path / "again"), PrepareSettings(size=5))
    assert (again.classes, again.num_images("train")) == (("Zebra", "ape", "ünï cödé"), 24)


def test_a_folder_that_holds_other_things_is_left_alone(tree: Path, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("all.parquet", "train-00000.parquet"):
        pq.write_table(pq.read_table(_small_parquet(tmp_path)), mine / name)
    before = contents(mine)
    for source in (tree, mine / "all.parquet"):
        with pytest.raises(ValueError, match=r"holds '(all|train-00000)\.parquet': give"):
            prepare(str(source), str(mine))
    with pytest.raises(ValueError, match=r"holds .*: give a new folder"):
        prepare(str(tree), str(tree / "ape"))
    assert contents(mine) == before


def _small_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": [0, 1]}), folder / "small.parquet")
    return folder / "small.parquet"


def test_copies_of_training_images_are_not_held_out(tmp_path: Path):
    for name in "ab":
        for i in range(20):
            save(tmp_path / "tree" / name / f"{i}.png", i // 2 + (100 if name == "a" else 0))  # two of each
    manifest = prepare(str(tmp_path / "tree"), str(tmp_path / "out"), PrepareSettings(val_fraction=0.3))
    splits = [{row["image"] for row in rows(tmp_path / "out", split)} for split in ("train", "val")]
    assert splits[1] and not splits[0] & splits[1]
    assert manifest.counts.in_both == 0
    assert manifest.counts.seen == sum(map(sum, manifest.counts.classes.values())) == 40
    assert "would have been held out are copies of training images" in manifest.counts.notes[-1]


def test_what_cannot_be_read_for_now_is_not_taken_for_unreadable(tree: Path, tmp_path: Path, monkeypatch):
    opened = open_source(str(tree))
    (task, *_) = plan(opened, str(tmp_path / "out"), PrepareSettings(max_bad=1))
    read = Path.read_bytes

    def fails_once(path: Path) -> bytes:
        if path.suffix == ".jpeg":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails_once)
        with pytest.raises(OSError, match="Input/output error"):
            task.run()
    assert task.run().bad == ()
    (tmp_path / "out" / "parts" / "train-00000.json").unlink()
    with monkeypatch.context() as patch:  # a decoder that is not there, as for HEIC, and is installed later
        patch.setattr("prelora_ray.data.prepare.encode", _refuse)
        assert len(task.run().bad) == len(task.items)
    assert task.run().bad == ()


def _refuse(*_: object) -> bytes:
    raise BadImageError("install something")


def test_shards_of_other_settings_do_not_stay(tree: Path, tmp_path: Path):
    prepare(str(tree), str(tmp_path / "out"), PrepareSettings(shard_rows=4))
    prepare(str(tree), str(tmp_path / "out"))
    assert set(contents(tmp_path / "out")) == {
        *("manifest.json", "train-00000.parquet", "val-00000.parquet"),
        *("parts/train-00000.json", "parts/val-00000.json"),
    }


PREPARE = """
import sys
from prelora_ray.data.prepare import prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.ray_session import ray_session
with ray_session():
    prepare(sys.argv[1], sys.argv[2], PrepareSettings(shard_rows=40))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments_ten_times_it_gives_the_same_bytes(tmp_path: Path):
    rng = np.random.default_rng(0)
    for i in range(1600):
        path = tmp_path / "tree" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (160, 160, 4), np.uint8)).save(path)
    one, two = tmp_path / "one", tmp_path / "two"
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "tree")]
    start = time.monotonic()
    subprocess.run([*command, str(one)], check=True)
    seconds = time.monotonic() - start
    found = []
    for _ in range(10):
        process = subprocess.Popen([*command, str(two)], start_new_session=True)
        time.sleep(rng.uniform(0.5, 0.95) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found.append(len(list(two.glob("*.parquet"))))
        if not (two / "manifest.json").exists():
            with pytest.raises(ValueError, match="no prepared folder"):
                read_manifest(Storage(two))
    subprocess.run([*command, str(two)], check=True)
    assert len(set(found) - {0}) > 0, "no kill came in the middle of the work"
    assert contents(two) == contents(one)
