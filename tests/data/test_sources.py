"""Every form of source, made here, read image by image."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.prepare import PrepareError, PrepareSettings, prepare
from prelora_ray.data.sources import open_source
from prelora_ray.storage import Storage
from tests.data.test_encode import UGLY, saved


def png(value: int, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def contents(root: Path) -> dict[str, list[tuple[bytes, str]]]:
    """Bytes and class name of every image, by split."""
    source = open_source(str(root))
    return {split: [(source.read(i), source.classes[i.label]) for i in items] for split, items in source.items.items()}


WNIDS = ["n01440764", "n01443537", "n02129165"]
TRAIN = {wnid: [png(10 * i + j) for j in range(3)] for i, wnid in enumerate(WNIDS)}
VAL = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": (png(100 + i), WNIDS[(2 * i) % 3]) for i in range(4)}


def write_train_tar(root: Path) -> None:
    inner = {f"{w}.tar": tar({f"{w}_{j}.JPEG": image for j, image in enumerate(TRAIN[w])}) for w in reversed(WNIDS)}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))


def write_train_folder(root: Path) -> None:
    for wnid, images in TRAIN.items():
        (root / "train" / wnid).mkdir(parents=True)
        for j, image in enumerate(images):
            (root / "train" / wnid / f"{wnid}_{j}.JPEG").write_bytes(image)


def write_val_tar(root: Path) -> None:
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar({name: image for name, (image, _) in reversed(VAL.items())}))


def write_val_folder(root: Path) -> None:
    (root / "val").mkdir()
    for name, (image, _) in VAL.items():
        (root / "val" / name).write_bytes(image)


def write_solution(root: Path) -> None:
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([name.removesuffix(".JPEG"), f"{wnid} 1 2 30 40 {wnid} 5 6 70 80 "] for name, (_, wnid) in VAL.items())


def devkit_files() -> dict[str, bytes]:
    from scipy.io import savemat

    ids = {wnid: 3 - i for i, wnid in enumerate(WNIDS)}  # the devkit's numbers are not in the order of the WordNet ids
    synsets = np.array([(ids[w], w) for w in WNIDS], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[wnid]}\n" for _, wnid in VAL.values())
    return {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def write_devkit_archive(root: Path) -> None:
    content = tar({f"ILSVRC2012_devkit_t12/data/{name}": c for name, c in devkit_files().items()})
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(content))


def write_devkit_folder(root: Path) -> None:
    (root / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
    for name, content in devkit_files().items():
        (root / "ILSVRC2012_devkit_t12" / "data" / name).write_bytes(content)


@pytest.mark.parametrize(
    "parts",
    [
        (write_train_tar, write_val_tar, write_solution),
        (write_train_tar, write_val_tar, write_devkit_archive),
        (write_train_folder, write_val_folder, write_solution),
        (write_train_tar, write_val_folder, write_devkit_folder),
    ],
    ids=lambda parts: "-".join(part.__name__.removeprefix("write_") for part in parts),
)
def test_imagenet_as_people_have_it(tmp_path, parts):
    for write in parts:
        write(tmp_path)
    assert open_source(str(tmp_path)).classes == tuple(WNIDS)
    found = contents(tmp_path)
    assert sorted(found["train"]) == sorted((image, wnid) for wnid, images in TRAIN.items() for image in images)
    assert sorted(found["val"]) == sorted(VAL.values())


def idx(array: np.ndarray) -> bytes:
    header = np.array([0x0800 + array.ndim, *array.shape], ">i4")
    return header.tobytes() + array.tobytes()


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_idx(tmp_path, compress: Callable[[bytes], bytes]):
    ending = ".gz" if compress is gzip.compress else ""
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, n in (("train", 6), ("t10k", 3)):
        arrays[prefix] = rng.integers(0, 256, (n, 4, 5), np.uint8), rng.integers(0, 3, n, np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte{ending}").write_bytes(compress(idx(arrays[prefix][0])))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{ending}").write_bytes(compress(idx(arrays[prefix][1])))
    found = contents(tmp_path)
    for split, prefix in (("train", "train"), ("val", "t10k")):
        for (image, name), pixels, label in zip(found[split], *arrays[prefix], strict=True):
            assert np.array_equal(np.array(Image.open(io.BytesIO(image))), pixels)
            assert name == str(label)


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("val", ["test-0.parquet", "validation/0.parquet"])
def test_hugging_face_parquet(tmp_path, column, plain, val):
    (tmp_path / "validation").mkdir()
    expected: dict[str, list[tuple[bytes, str]]] = {"train": [], "val": []}
    features = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"]}}}}
    for file, split, first in (("train-0.parquet", "train", 0), ("train-1.parquet", "train", 7), (val, "val", 14)):
        images = [png(first + i) for i in range(7)]
        labels = [i % 2 for i in range(7)]
        rows = images if plain else [{"bytes": image, "path": "x.png"} for image in images]
        table = pa.table({column: rows, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, tmp_path / file, row_group_size=3)
        expected[split] += [(image, ("cat", "dog")[label]) for image, label in zip(images, labels, strict=True)]
    assert open_source(str(tmp_path)).classes == ("cat", "dog", "eel")
    assert contents(tmp_path) == expected


def test_webdataset(tmp_path):
    for shard, first in (("train-000.tar", 0), ("train-001.tar", 3), ("val-000.tar", 6)):
        files = {}
        for i in range(first, first + 3):
            label = {f"a/{i:05d}.json": json.dumps({"label": i % 3}).encode()} if i % 2 else {f"a/{i:05d}.cls": b"%d" % (i % 3)}
            files |= {f"a/{i:05d}.jpg": png(i)} | label | {f"a/{i:05d}.txt": b"a caption"}
        (tmp_path / shard).write_bytes(tar(files))
    found = contents(tmp_path)
    assert found["train"] == [(png(i), str(i % 3)) for i in range(6)]
    assert found["val"] == [(png(i), str(i % 3)) for i in range(6, 9)]


def test_prepare_of_a_source_that_is_read_in_blocks_is_mixed_and_whole(tmp_path, ray_cluster):
    """Class-sorted row groups must not become class-sorted shards."""
    images, labels = [png(i % 256, (3 + i // 256, 4)) for i in range(600)], [i // 60 for i in range(600)]
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "source" / "train.parquet", row_group_size=10)
    out = tmp_path / "out"
    manifest = prepare(str(tmp_path / "source"), str(out), PrepareSettings(shard_rows=40, val_fraction=0.1))
    rows = [r for shard in manifest.splits["train"] for r in pq.read_table(out / shard.file).to_pylist()]
    assert len({row["source"] for row in rows}) == len(rows) == 540
    assert all(images[int(row["source"].split("/")[1]) * 10 + int(row["source"].split("/")[2])] == row["image"] for row in rows)
    assert all(len({row["label"] for row in rows[i : i + 40]}) > 4 for i in range(0, 520, 40))


def write_parquet(root: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), root / "train.parquet")


def cut(path: Path, bytes_left: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_left])


def write_idx(root: Path, images: int = 2, labels: int = 2) -> None:
    (root / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((images, 4, 4), np.uint8)))
    (root / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(labels, np.uint8)))


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("empty", lambda p: None, "has no class folders"),
    ("one class", lambda p: [(p / "a").mkdir(), (p / "a" / "1.png").write_bytes(png(1))], "has one class alone, 'a'"),
    ("no images", lambda p: [(p / "a").mkdir(), (p / "b").mkdir()], "has no files in the class folders"),
    ("val class", lambda p: [(p / d).mkdir(parents=True) for d in ("train/a", "val/b")], "class 'b' in val but not in train"),
    ("no train", write_val_tar, "has neither ILSVRC2012_img_train.tar nor a folder train"),
    ("no labels", lambda p: [write_train_tar(p), write_val_tar(p)], "has no labels of the validation images"),
    ("no tar", lambda p: (p / "ILSVRC2012_img_train.tar").write_bytes(b"x" * 2000), "is no whole tar"),
    (
        "flat tar",
        lambda p: (p / "ILSVRC2012_img_train.tar").write_bytes(tar({"a.JPEG": png(1)})),
        "is not the tar of one tar a",
    ),
    ("cut tar", lambda p: [write_train_tar(p), cut(p / "ILSVRC2012_img_train.tar", 9000)], "is cut off in the middle"),
    (
        "few truths",
        lambda p: [write_train_tar(p), write_devkit_archive(p), (p / "val").mkdir(), (p / "val/1.JPEG").write_bytes(png(1))],
        "labels 4 validation images, and there are 1",
    ),
    (
        "other table",
        lambda p: [write_train_tar(p), write_val_tar(p), (p / "LOC_val_solution.csv").write_text("a,b\n1,2\n")],
        "is not a table of ImageId",
    ),
    ("cut idx", lambda p: [write_idx(p), cut(p / "train-images-idx3-ubyte", 40)], "is no whole IDX file of 3 dimensions"),
    ("idx pair", lambda p: write_idx(p, labels=3), "has 2 images and 3 labels"),
    ("idx alone", lambda p: [write_idx(p), (p / "train-labels-idx1-ubyte").unlink()], "no files train-labels-idx1-ubyte"),
    ("cut parquet", lambda p: [write_parquet(p, image=[b"x"], label=[0]), cut(p / "train.parquet", 99)], "no whole Parquet"),
    ("columns", lambda p: write_parquet(p, pixels=[b"x"], label=[0]), "it needs `image` or `img`, and `label`"),
    ("null label", lambda p: write_parquet(p, image=[b"x", b"y"], label=[0, None]), "a label that is no whole number"),
    ("negative", lambda p: write_parquet(p, image=[b"x"], label=[-1]), "has label -1: labels are whole numbers from 0 on"),
    ("no cls", lambda p: (p / "a.tar").write_bytes(tar({"1.jpg": png(1)})), "has no label (.cls or .json) for the sample '1'"),
    ("odd cls", lambda p: (p / "a.tar").write_bytes(tar({"1.jpg": png(1), "1.cls": b"cat"})), "no whole number as a label"),
    ("twice", lambda p: (p / "a.tar").write_bytes(tar({"1.jpg": b"", "1.png": b""})), "has two images of the sample '1'"),
    (
        "cut shard",
        lambda p: (p / "a.tar").write_bytes(tar({"1.cls": b"0", "1.jpg": png(1)})[:1600]),
        "is cut off in the middle",
    ),
]


@pytest.mark.parametrize(("make", "sentence"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_source_ends_in_one_sentence(tmp_path, make, sentence):
    make(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_source(str(tmp_path))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tree_of_ugly_images(tmp_path, ray_cluster):
    tree = tmp_path / "tree"
    for name in ("a", "b"):
        (tree / name).mkdir(parents=True)
        for kind, (content, _) in UGLY.items():
            (tree / name / f"{kind} without an ending").write_bytes(content)
    broken = {"cut.jpg": UGLY["cmyk"][0][:200], "empty.png": b"", "text.jpeg": b"no image", "noending": b"\0" * 99}
    for name, content in broken.items():
        (tree / "a" / name).write_bytes(content)
    (tree / "a" / "bomb.png").write_bytes(saved(Image.new("1", (3000, 3000)), "PNG"))
    (tree / "b" / "Thumbs.db").write_bytes(b"no image, and does not say so")
    settings = PrepareSettings(max_bad=0.2, max_pixels=10**6)
    manifest = prepare(str(tree), str(tmp_path / "out"), settings)
    assert manifest.num_images("train") + manifest.num_images("val") == 2 * len(UGLY)
    assert manifest.bad == 5
    listed = {entry["image"]: entry["reason"] for entry in json.loads((tmp_path / "out" / "bad.json").read_text())}
    assert set(listed) == {f"a/{name}" for name in (*broken, "bomb.png")}
    assert listed["a/empty.png"] == "the file is empty"
    assert "3000 x 3000 pixels" in listed["a/bomb.png"]
    assert read_manifest(Storage(tmp_path / "out")).classes == ("a", "b")
    with pytest.raises(PrepareError, match=f"5 of {2 * len(UGLY) + 6} images"):
        prepare(str(tree), str(tmp_path / "out2"), PrepareSettings(max_pixels=10**6))
