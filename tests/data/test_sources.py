"""Every form of source, made here, read image by image."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.prepare import PrepareError, prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.sources import Columns, Splits, open_source
from prelora_ray.errors import WorkError
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
    return {split: [(source.reader.read(i), source.classes[i.label]) for i in items] for split, items in source.items.items()}


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


def test_an_idx_bomb_is_unpacked_no_further_than_its_header_says(tmp_path):
    write_idx(tmp_path)
    bomb = gzip.compress(idx(np.zeros((2, 4, 4), np.uint8)) + bytes(2**26))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is no whole IDX file of 3 dimensions"):
        open_source(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_an_idx_header_that_lies_is_told(tmp_path, compress):
    write_idx(tmp_path)
    header = np.array([0x0803, 2**31, 2**31, 2**31], ">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(compress(header + bytes(100)))
    with pytest.raises(ValueError, match="its header says 9,903,520,314,283,042,199,192,993,792 bytes, more than"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["large", "sparse", "cut off", "no tar"])
def test_a_devkit_that_is_a_bomb_or_none_is_told(tmp_path, kind):
    write_train_tar(tmp_path)
    write_val_tar(tmp_path)
    write_devkit_archive(tmp_path)
    archive = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    match kind:
        case "large":
            content = gzip.compress(tar({"data/meta.mat": bytes(2**27)}))
        case "sparse":  # 16 bytes of data, and a terabyte of nothing
            member = tarfile.TarInfo("data/meta.mat")
            member.pax_headers = {"GNU.sparse.map": "0,16", "GNU.sparse.size": str(2**40)}
            member.size = 16
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as written:
                written.addfile(member, io.BytesIO(bytes(16)))
            content = gzip.compress(buffer.getvalue())
        case "cut off":
            content = archive.read_bytes()[:-20]
        case "no tar":
            content = gzip.compress(b"x" * 1024)
    archive.write_bytes(content)
    told = "has no labels of the validation images" if kind == "sparse" else r"devkit_t12\.tar\.gz is no devkit: "
    tracemalloc.start()
    with pytest.raises(ValueError, match=told):
        open_source(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27


@pytest.mark.parametrize("free", [2**24, 0])
def test_a_tar_is_not_unpacked_onto_the_last_of_a_disk(tmp_path, monkeypatch, free):
    (tmp_path / "0.tgz").write_bytes(gzip.compress(tar({"cat/1.png": png(1), "dog/1.png": png(2)})))
    assert listed(tmp_path)[0] == ("cat", "dog")
    (tmp_path / "1.tgz").write_bytes(gzip.compress(tar({"cat/2.png": png(3)})))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=free))
    with pytest.raises(WorkError, match=rf"{tmp_path}/1\.tgz cannot be unpacked into .*; give it unpacked, or set TMPDIR"):
        open_source(str(tmp_path))


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


def test_idx_files_as_torchvision_leaves_them(tmp_path):
    """Some folders down, each beside its gzipped form."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw, labels=[1, 0])
    for path in list(raw.iterdir()):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert listed(tmp_path) == (("0", "1"), {"train": 2}, {("no IDX file of these sets", ".gz"): 2})
    shutil.copytree(raw, tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(ValueError, match="has IDX files in 'FashionMNIST/raw' and in 'MNIST/raw': give one of these folders"):
        open_source(str(tmp_path))


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
    source = open_source(str(tmp_path))
    assert source.classes == ("cat", "dog")  # no image shows an eel
    assert source.notes == ("1 named class has no training images and is left out, of 3: eel",)
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


def write_folders(root: Path, *folders: str) -> None:
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        (root / folder / "1.png").write_bytes(png(i))


def cut(path: Path, bytes_left: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_left])


def write_idx(root: Path, images: int = 2, labels: Sequence[int] = (0, 0)) -> None:
    root.mkdir(exist_ok=True)
    (root / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((images, 4, 4), np.uint8)))
    (root / "train-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("empty", lambda p: None, "has no class folders"),
    ("one class", lambda p: [(p / "a").mkdir(), (p / "a" / "1.png").write_bytes(png(1))], "has one class alone, 'a'"),
    ("no images", lambda p: [(p / "a").mkdir(), (p / "b").mkdir()], "has no class folders"),
    (
        "val class",
        lambda p: write_folders(p, "train/a", "train/b", "val/c"),
        "has 'val/c/1.png' of class 'c' in val, and no such class",
    ),
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
    ("idx pair", lambda p: write_idx(p, labels=[0, 1, 2]), "has 2 images and 3 labels"),
    ("idx alone", lambda p: [write_idx(p), (p / "train-labels-idx1-ubyte").unlink()], "no files train-labels-idx1-ubyte"),
    ("cut parquet", lambda p: [write_parquet(p, image=[b"x"], label=[0]), cut(p / "train.parquet", 99)], "no whole Parquet"),
    (
        "columns",
        lambda p: write_parquet(p, pixels=[b"x"], label=[0]),
        "it needs one such as `image` or `img`; name another with --image-column",
    ),
    (
        "null label",
        lambda p: write_parquet(p, image=[b"x", b"y"], label=[0, None]),
        "has the label None: a label is a whole number, a name or a truth value",
    ),
    ("negative", lambda p: write_parquet(p, image=[b"x"], label=[-1]), "has label -1: labels are whole numbers from 0 on"),
    ("no cls", lambda p: (p / "a.tar").write_bytes(tar({"1.jpg": png(1)})), "has no label (.cls or .json) for the sample '1'"),
    (
        "odd json",
        lambda p: (p / "a.tar").write_bytes(tar({"1.jpg": png(1), "1.json": b"{"})),
        "no label that can be read in '1.json'",
    ),
    (
        "list label",
        lambda p: (p / "a.tar").write_bytes(tar({"1.jpg": png(1), "1.json": b'{"label": [1]}'})),
        "has [1] in '1.json'",
    ),
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
    settings = PrepareSettings(max_bad=0.2, max_overlap=1, max_pixels=10**6)
    manifest = prepare(str(tree), str(tmp_path / "out"), settings)
    assert manifest.num_images("train") + manifest.num_images("val") == 2 * len(UGLY)
    assert manifest.bad == 5
    listed = {entry["image"]: entry["reason"] for entry in json.loads((tmp_path / "out" / "bad.json").read_text())}
    assert set(listed) == {f"a/{name}" for name in (*broken, "bomb.png")}
    assert listed["a/empty.png"] == "the file is empty"
    assert "3000 x 3000 pixels" in listed["a/bomb.png"]
    assert read_manifest(Storage(tmp_path / "out")).classes == ("a", "b")
    with pytest.raises(PrepareError, match=f"5 of {2 * len(UGLY) + 5} images"):
        prepare(str(tree), str(tmp_path / "out2"), PrepareSettings(max_pixels=10**6))


def listed(root: Path, **options: object) -> tuple[tuple[str, ...], dict[str, int], dict[tuple[str, str], int]]:
    """Classes, number of images by split, and what is left out."""
    source = open_source(str(root), **options)
    return source.classes, {split: len(items) for split, items in source.items.items()}, dict(source.skipped)


def numbered(*folders: str, suffix: str = "png") -> dict[str, bytes]:
    """Two images in each folder, all of them different."""
    return {f"{folder}/{i}.{suffix}": png(2 * n + i) for n, folder in enumerate(folders) for i in range(2)}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


TREES: dict[str, tuple[list[str], tuple[str, ...], dict[str, int], dict[tuple[str, str], int]]] = {
    "train valid test": (
        ["train/a", "train/b", "valid/a", "valid/b", "test/a", "test/b"],
        ("a", "b"),
        {"train": 4, "val": 4},
        {("of split test, which is not used", ".png"): 4},
    ),
    "test validates": (["Train/a", "Train/b", "TEST/a"], ("a", "b"), {"train": 4, "val": 2}, {}),
    "a folder of no split": (
        ["train/a", "train/b", "dev/b", "extra/c"],
        ("a", "b"),
        {"train": 4, "val": 2},
        {("in no split", ".png"): 2},
    ),
    "delimited words": (["my-train.2017/a", "my-train.2017/b", "my-val.2017/b"], ("a", "b"), {"train": 4, "val": 2}, {}),
    "below one folder": (["set/v1/train/a", "set/v1/train/b", "set/v1/val/a"], ("a", "b"), {"train": 4, "val": 2}, {}),
    "railway trains": (["train", "bus", "car"], ("bus", "car", "train"), {"train": 6}, {}),
    "no train": (["a", "b", "val/a"], ("a", "b"), {"train": 4, "val": 2}, {}),
}


@pytest.mark.parametrize("tree", TREES)
def test_splits_of_image_folders(tmp_path, tree):
    folders, *expected = TREES[tree]
    write(tmp_path, numbered(*folders))
    assert list(listed(tmp_path)) == expected


def test_folders_without_images_are_no_classes(tmp_path):
    write(tmp_path, numbered("a", "b") | {"notes/readme.txt": b"x", "annotations/a/1.xml": b"x", "Thumbs.db": b"x"})
    (tmp_path / "empty").mkdir()
    assert listed(tmp_path)[0] == ("a", "b")
    assert sum(listed(tmp_path)[2].values()) == 3


def test_splits_of_shards(tmp_path):
    sample = lambda n: {f"{n}.png": png(n), f"{n}.cls": b"%d" % (n % 2)}  # noqa: E731
    for shard, n in {"imagenet1k-train-0000.tar": 0, "imagenet1k-validation-00.tar": 2, "Extra.tar": 4}.items():
        (tmp_path / shard).write_bytes(tar(sample(n) | sample(n + 1)))
    assert contents(tmp_path) == {"train": [(png(0), "0"), (png(1), "1")], "val": [(png(2), "0"), (png(3), "1")]}
    assert listed(tmp_path)[2] == {("in no split", ".png"): 2}
    chosen = open_source(str(tmp_path), Splits(train="Extra.tar", val="*train*"))
    assert [item.name for item in chosen.items["train"]] == ["Extra.tar/4.png", "Extra.tar/5.png"]
    assert chosen.items["val"][0].name == "imagenet1k-train-0000.tar/0.png"


@pytest.mark.parametrize(
    ("val", "expected"),
    [
        ("default/partial-validation/0000.parquet", {"train": 2, "val": 2}),
        ("default/eval/0000.parquet", {"train": 2, "val": 2}),
        ("default/more/0000.parquet", {"train": 2}),
    ],
)
def test_splits_of_parquet(tmp_path, val, expected):
    for name, first in (("default/partial-train/0000.parquet", 0), (val, 2)):
        (tmp_path / name).parent.mkdir(parents=True)
        pq.write_table(pa.table({"image": [png(first), png(first + 1)], "label": [0, 1]}), tmp_path / name)
    assert listed(tmp_path)[1] == expected
    assert sum(listed(tmp_path)[2].values()) == 4 - sum(expected.values())


def test_samples_whose_keys_have_dots(tmp_path):
    keys = [f"a{i}" for i in range(3)] + [f"22.05_{i}" for i in range(3)] + ["v1.0/b.c"]
    members = {
        f"{key}.{end}": png(i) if end == "jpg" else b"%d" % (i % 2) for i, key in enumerate(keys) for end in ("jpg", "cls")
    }
    (tmp_path / "0.tar").write_bytes(tar(members))
    assert contents(tmp_path) == {"train": [(png(i), str(i % 2)) for i in range(7)]}


def test_samples_of_several_files(tmp_path):
    members = {
        **{"1.left.jpg": png(1), "1.cls": b"0"},
        **{"2.jpg": png(2), "2.mask.png": png(9), "2.json": b'{"caption": "x"}', "2.cls": b"1"},
        **{"3.jpg": png(3), "3.json": b'{"label": 0}', "3.txt": b"a caption"},
        **{"4.cls": b"1"},
    }
    (tmp_path / "0.tgz").write_bytes(gzip.compress(tar(members)))
    assert contents(tmp_path) == {"train": [(png(1), "0"), (png(2), "1"), (png(3), "0")]}
    reasons = {reason for reason, _ in listed(tmp_path)[2]}
    assert reasons == {"a further image of its sample", "neither image nor label", "a label without an image"}


def test_names_of_numbered_classes(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "0.tar").write_bytes(tar({"1.jpg": png(1), "1.cls": b"1", "2.jpg": png(2), "2.cls": b"0"}))
    assert contents(tmp_path) == {"train": [(png(1), "dog"), (png(2), "cat")]}
    write_idx(tmp_path / "idx", labels=[0, 1])
    (tmp_path / "idx" / "classnames.txt").write_text("cat\ndog")
    assert listed(tmp_path / "idx")[0] == ("cat", "dog")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([48586, 5_000_000], ("48586", "5000000")),
        ([2**33, 7], ("7", "8589934592")),
        ([True, False], ("False", "True")),
        (["dog", "cat"], ("cat", "dog")),
        ([0, 1], ("0", "1")),
    ],
)
def test_labels_are_the_classes_that_occur(tmp_path, labels, classes):
    write_parquet(tmp_path, image=[png(0), png(1)], label=labels)
    source = open_source(str(tmp_path))
    assert source.classes == classes
    assert [source.classes[item.label] for item in source.items["train"]] == [str(label) for label in labels]
    assert bool(source.notes) == (labels in ([48586, 5_000_000], [2**33, 7]))


def test_columns_by_their_usual_names_and_by_choice(tmp_path):
    write_parquet(tmp_path, img=[png(0), png(1)], fine_label=[3, 4], coarse=[1, 0], other=[b"x", b"y"])
    assert listed(tmp_path)[0] == ("3", "4")
    assert contents(tmp_path)["train"] == [(png(0), "3"), (png(1), "4")]
    chosen = open_source(str(tmp_path), columns=Columns("other", "coarse"))
    assert [(chosen.reader.read(i), chosen.classes[i.label]) for i in chosen.items["train"]] == [(b"x", "1"), (b"y", "0")]
    with pytest.raises(ValueError, match="it needs `none`; name another with --label-column"):
        open_source(str(tmp_path), columns=Columns(label="none"))


def test_rows_that_name_files(tmp_path):
    write(tmp_path, {"pictures/a.png": png(1), "b.png": png(2)})
    write_parquet(tmp_path, image=["pictures/a.png", "b.png", "gone.png", "../x.png", None], label=[0, 1, 0, 1, 0])
    source = open_source(str(tmp_path))
    a, b, *rest = source.items["train"]
    assert (source.reader.read(a), source.reader.read(b)) == (png(1), png(2))
    for item, reason in zip(rest, ("names no file", "leads out of the source", "holds no bytes"), strict=True):
        with pytest.raises(ValueError, match=reason):
            source.reader.read(item)


def test_names_that_are_bytes_and_names_of_two_forms(tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        write(tmp_path, numbered(f"{split}/{unicodedata.normalize(form, 'é')}", f"{split}/b"))
    latin = os.path.join(os.fsencode(tmp_path), b"train", b"b", b"\xe9t\xe9.png")
    with open(latin, "wb") as file:
        file.write(png(99))
    source = open_source(str(tmp_path))
    assert source.classes == ("b", "é")
    assert {split: len(items) for split, items in source.items.items()} == {"train": 5, "val": 4}
    (item,) = [item for item in source.items["train"] if "\\xe9" in item.name]
    assert item.name == "train/b/\\xe9t\\xe9.png"
    assert source.reader.read(item) == png(99)


def test_tars_and_parquet_files_below_names_that_are_bytes(tmp_path):
    root = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"s\xe9t"))
    for kind, content in (("tar", tar(numbered("a", "b"))), ("tgz", gzip.compress(tar(numbered("a", "b"))))):
        folder = os.path.join(root, kind, os.fsdecode(b"d\xe9"))
        os.makedirs(folder)
        with open(os.path.join(folder, f"x.{kind}"), "wb") as file:
            file.write(content)
    parquet = os.path.join(root, "parquet", os.fsdecode(b"d\xe9"))
    os.makedirs(parquet)
    with open(os.path.join(parquet, "x.parquet"), "wb") as file:
        pq.write_table(pa.table({"image": [png(0), png(1)], "label": [0, 1]}), file)
    for kind, number in (("tar", 4), ("tgz", 4), ("parquet", 2)):
        source = open_source(os.path.join(root, kind))
        assert [source.reader.read(item) for item in source.items["train"]] == [png(i) for i in range(number)]
        assert all("d\\xe9" in item.name for item in source.items["train"])


def test_leftovers_in_an_image_folder_change_nothing(tmp_path):
    write(tmp_path, numbered("a", "b") | {"images.tar": b"zz", "metadata.parquet": b"zz", ".git/x.png": png(1)})
    assert listed(tmp_path) == (
        ("a", "b"),
        {"train": 4},
        {("in no class folder", ".tar"): 1, ("in no class folder", ".parquet"): 1},
    )


def test_a_dot_does_not_make_an_ending(tmp_path):
    write(tmp_path, {f"{name}/22.05_{i}": png(10 * n + i) for n, name in enumerate("ab") for i in range(2)})
    assert listed(tmp_path) == (("a", "b"), {"train": 4}, {})


def test_a_split_whose_labels_are_in_a_table_beside_one_with_class_folders(tmp_path):
    write(tmp_path, numbered("train/0", "train/1", "val/images") | {"val/labels.csv": b"file,label\n0.png,1\n1.png,0\n"})
    assert contents(tmp_path)["val"] == [(png(4), "1"), (png(5), "0")]


def test_a_number_written_otherwise_is_no_number(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar({"1.png": png(1), "1.cls": b"01", "2.png": png(2), "2.cls": b"1"}))
    with pytest.raises(ValueError, match="has labels of several kinds: int, str"):
        open_source(str(tmp_path))


def test_prepared_folders_in_a_bucket_are_no_source(bucket):
    root = Storage(f"{bucket}/source-with-prepared")
    for name, content in numbered("a", "b", "out/c").items():
        root.write_bytes(name, content)
    (root / "out").write_json("manifest.json", {"schema": 2, "classes": ["a", "b"], "splits": {}})
    source = open_source(root.uri)
    assert source.classes == ("a", "b")
    assert [source.reader.read(item) for item in source.items["train"]] == [png(i) for i in range(4)]
    assert not source.skipped


def test_links(tmp_path):
    write(tmp_path, numbered("a", "there/b"))
    (tmp_path / "b").symlink_to(tmp_path / "there" / "b")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # to read it would wait for ever
    source = open_source(str(tmp_path))
    (pipe,) = [item for item in source.items["train"] if item.name == "a/pipe.png"]
    assert not pipe.stamp
    with pytest.raises(ValueError, match="a link that leads nowhere or a pipe"):
        source.reader.read(pipe)
    (gone,) = [item for item in source.items["train"] if item.name == "a/gone.png"]
    with pytest.raises(ValueError, match="a link that leads nowhere"):
        source.reader.read(gone)
    assert {item.name for item in source.items["train"]} >= {"a/0.png", "b/0.png", "there/b/0.png"}


def write_kaggle(root: Path) -> None:
    base = root / "ILSVRC" / "Data" / "CLS-LOC"
    write(
        base / "train", {f"{wnid}/{wnid}_{i}.JPEG": image for wnid, images in TRAIN.items() for i, image in enumerate(images)}
    )
    write(base / "val", {name: image for name, (image, _) in VAL.items()})
    write(base / "test", {"ILSVRC2012_test_00000001.JPEG": png(200)})
    write(root / "ILSVRC" / "Annotations", {"train/n01440764/1.xml": b"x"})


def test_kaggles_tree(tmp_path):
    write_kaggle(tmp_path)
    write_solution(tmp_path)
    found = contents(tmp_path)
    assert sorted(found["train"]) == sorted((image, wnid) for wnid, images in TRAIN.items() for image in images)
    assert sorted(found["val"]) == sorted(VAL.values())
    assert sum(listed(tmp_path)[2].values()) == 2  # an image to be tested on, an annotation
    with pytest.raises(ValueError, match="has images without labels in val"):
        open_source(str(tmp_path / "ILSVRC" / "Data" / "CLS-LOC"))


def test_tiny_imagenet(tmp_path):
    write(tmp_path, numbered("train/n01/images", "train/n02/images", "val/images", "test/images", suffix="JPEG"))
    write(tmp_path, {"val/val_annotations.txt": b"0.JPEG\tn02\t0\t0\t9\t9\n1.JPEG\tn01\t0\t0\t9\t9\n", "wnids.txt": b"n01\n"})
    assert contents(tmp_path) == {
        "train": [(png(0), "n01"), (png(1), "n01"), (png(2), "n02"), (png(3), "n02")],
        "val": [(png(4), "n02"), (png(5), "n01")],
    }


@pytest.mark.parametrize(
    "table", ["id,breed\n0,pug\n1,boxer\n", "file_name,split,label\ntrain/0.png,x,pug\n./train/1.png,y,boxer\n"]
)
def test_a_table_of_labels(tmp_path, table):
    write(tmp_path, numbered("train", "test") | {"labels.csv": table.encode()})
    if "/" not in table:
        (tmp_path / "test" / "0.png").rename(tmp_path / "test" / "8.png")
        (tmp_path / "test" / "1.png").rename(tmp_path / "test" / "9.png")
    for source in (tmp_path, tmp_path / "labels.csv"):
        assert contents(source) == {"train": [(png(0), "pug"), (png(1), "boxer")]}
    assert listed(tmp_path)[2] == {("in no table", ".png"): 2}


def test_a_tar_of_class_folders(tmp_path):
    files = numbered("imagenette2/train/a", "imagenette2/train/b", "imagenette2/val/a")
    (tmp_path / "imagenette2.tgz").write_bytes(gzip.compress(tar(files)))
    for source in (tmp_path, tmp_path / "imagenette2.tgz"):
        assert contents(source) == {
            "train": [(png(0), "a"), (png(1), "a"), (png(2), "b"), (png(3), "b")],
            "val": [(png(4), "a"), (png(5), "a")],
        }


def test_a_tar_that_is_not_whole_to_its_end_is_refused(tmp_path):
    whole = tar(numbered("a", "b"))
    second = whole.index(b"a/1.png")
    broken = {
        "cut at a member": whole[:second],
        "cut inside its head": whole[: second + 300],
        "a damaged head": whole[:second] + b"\xff" * 20 + whole[second + 20 :],
        "two in one": whole + whole,
    }
    for content in broken.values():
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"is cut off or damaged at byte|goes on behind its end"):
            open_source(str(tmp_path))


def test_links_in_a_tar(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in numbered("a", "b").items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, kind, target in (
            ("a/hard.png", tarfile.LNKTYPE, "a/0.png"),
            ("b/soft.png", tarfile.SYMTYPE, "../a/1.png"),
            ("b/gone.png", tarfile.SYMTYPE, "nowhere.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    source = open_source(str(tmp_path))
    by_name = {item.name: item for item in source.items["train"]}
    assert len(by_name) == 7
    assert source.reader.read(by_name["x.tar/a/hard.png"]) == png(0)
    assert source.reader.read(by_name["x.tar/b/soft.png"]) == png(1)
    with pytest.raises(ValueError, match="a link that leads nowhere"):
        source.reader.read(by_name["x.tar/b/gone.png"])


@pytest.mark.parametrize("folders", [["cat/train", "cat/val", "dog/train", "dog/val"], ["data/train/a", "data/val/a", "docs"]])
def test_splits_inside_of_classes_are_refused(tmp_path, folders):
    write(tmp_path, numbered(*folders))
    with pytest.raises(ValueError, match="a split's folder inside of what looks like a class"):
        open_source(str(tmp_path))


def test_a_splits_folder_once_more_inside_itself(tmp_path):
    write(tmp_path, numbered("seg_train/seg_train/a", "seg_train/seg_train/b", "seg_test/seg_test/b"))
    assert listed(tmp_path) == (("a", "b"), {"train": 4, "val": 2}, {})


def test_flat_folders_of_several_splits_are_no_classes(tmp_path):
    write(tmp_path, numbered("train", "test", "sample") | {"labels.csv": b"id,label\ntrain/0,x\ntrain/1,y\n"})
    assert contents(tmp_path) == {"train": [(png(0), "x"), (png(1), "y")]}


def test_a_folder_that_names_two_splits_is_passed_through(tmp_path):
    write(tmp_path, numbered("train_test_split/train/a", "train_test_split/train/b", "train_test_split/test/b"))
    assert listed(tmp_path) == (("a", "b"), {"train": 4, "val": 2}, {})


def test_splits_by_the_names_of_tars_and_of_folders_inside(tmp_path):
    folders, samples = tmp_path / "folders", tmp_path / "samples"
    write(folders, {"train.tar": tar(numbered("a", "b")), "val.tar": tar(numbered("a", "b"))})
    assert listed(folders)[1] == {"train": 4, "val": 4}
    members = {
        f"{split}/{i}.{end}": png(i) if end == "png" else b"%d" % i
        for split in ("train", "val")
        for i in range(2)
        for end in ("png", "cls")
    }
    write(samples, {"0.tar": tar(members)})
    assert listed(samples)[1] == {"train": 2, "val": 2}


def test_a_pattern_that_fits_nothing_is_refused(tmp_path):
    write(tmp_path, numbered("train/a", "train/b", "val/a"))
    with pytest.raises(ValueError, match=r"--val-split 'nosuch\*' is not allowed: no image"):
        open_source(str(tmp_path), Splits(val="nosuch*"))
    with pytest.raises(ValueError, match="--val-split 'test' is not allowed: no image of 'digits'"):
        open_source("digits", Splits(val="test"))
    with pytest.raises(ValueError, match=rf"--train-split 'nosuch\*' is not allowed: no image of '{tmp_path}', read as image"):
        open_source(str(tmp_path), Splits(train="nosuch*"))
    shards, idx_files, imagenet = tmp_path / "shards", tmp_path / "idx", tmp_path / "imagenet"
    write(shards, {"0.tar": tar({"1.jpg": png(1), "1.cls": b"1", "2.jpg": png(2), "2.cls": b"0"})})
    (tmp_path / "rows").mkdir()
    write_parquet(tmp_path / "rows", image=[png(0), png(1)], label=[0, 1])
    write_idx(idx_files, labels=[0, 1])
    imagenet.mkdir()
    write_train_tar(imagenet)
    for source in (shards, tmp_path / "rows", idx_files, imagenet, "digits"):
        assert open_source(str(source)).items["train"]
        with pytest.raises(ValueError, match="--train-split 'nosuch' is not allowed: no image of"):
            open_source(str(source), Splits(train="nosuch"))


@pytest.mark.parametrize("name", ["split", "Usage"])
def test_a_column_of_splits_is_not_read_and_that_is_told(tmp_path, name):
    note = f"the column `{name}` is not read: splits are told by the names of files and folders alone"
    table = f"file,label,{name}\na.png,x,train\nb.png,y,test"
    write(tmp_path, {"a.png": png(0), "b.png": png(1), "labels.csv": table.encode()})
    assert open_source(str(tmp_path)).notes == (note,)
    (tmp_path / "rows").mkdir()
    write_parquet(tmp_path / "rows", image=[png(0), png(1)], label=[0, 1], **{name: ["train", "test"]})
    shutil.copy(tmp_path / "rows" / "train.parquet", tmp_path / "rows" / "train-1.parquet")
    assert open_source(str(tmp_path / "rows")).notes == (note,)
    chosen = open_source(str(tmp_path / "rows"), columns=Columns(label=name))
    assert (chosen.classes, chosen.notes) == (("test", "train"), ())


def test_a_json_beside_class_folders_in_a_tar_is_no_label(tmp_path):
    write(tmp_path, {"0.tar": tar(numbered("a", "b") | {"a/info.json": b"{}"})})
    assert listed(tmp_path)[:2] == (("a", "b"), {"train": 5})  # which is told once it was read


def test_parquet_files_that_name_other_classes_are_refused(tmp_path):
    for file, names in (("train.parquet", ["cat", "dog"]), ("val.parquet", ["dog", "cat"])):
        table = pa.table({"image": [png(0), png(1)], "label": [0, 1]})
        features = {"info": {"features": {"label": {"names": names}}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / file)
    with pytest.raises(ValueError, match=r"val\.parquet names other classes than the Parquet files before it"):
        open_source(str(tmp_path))


def test_a_test_split_without_labels_that_is_not_used(tmp_path):
    for file in ("train.parquet", "validation.parquet"):
        pq.write_table(pa.table({"image": [png(0), png(1)], "label": [0, 1]}), tmp_path / file)
    pq.write_table(pa.table({"image": [png(2)]}), tmp_path / "test.parquet")
    assert listed(tmp_path)[1:] == ({"train": 2, "val": 2}, {("of split test, which is not used", ""): 1})


def test_an_image_that_a_row_names_and_that_changes_changes_its_stamp(tmp_path):
    write(tmp_path, {"a.png": png(1), "b.png": png(2)})
    write_parquet(tmp_path, image=["a.png", "b.png"], label=[0, 1])
    before = open_source(str(tmp_path)).items["train"]
    (tmp_path / "b.png").write_bytes(png(3, (9, 9)))
    after = open_source(str(tmp_path)).items["train"]
    assert [one.stamp == other.stamp for one, other in zip(before, after, strict=True)] == [True, False]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("file,label\n", "has no lines"),
        ("file,label\na.png,x\na,y\n", "gives 'a.png' two labels, 'x' and 'y'"),
        ("file,label\na.png,x\na.png,y\n", "gives 'a.png' two labels, 'x' and 'y'"),
        ('file,label\na.png,x\nb.png,"y\n', "is no whole table"),
        ("file,label\na.png, \nb.png,x\n", "a line without a file or a label"),
        ("file,label\nz.png,x\n", "names 'z.png', and no such file is there"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, table, sentence):
    write(tmp_path, {"a.png": png(0), "b.png": png(1), "labels.csv": table.encode()})
    with pytest.raises(ValueError, match=sentence):
        open_source(str(tmp_path))


def test_a_table_takes_the_nearest_file_of_a_name(tmp_path):
    write(
        tmp_path,
        {"0.png": png(0), "1.png": png(1), "masks/0.png": png(2), "labels.csv": b"file,label\n0.png, cat\n1.png,dog \n"},
    )
    assert contents(tmp_path) == {"train": [(png(0), "cat"), (png(1), "dog")]}
    splits = tmp_path / "splits"
    write(
        splits, numbered("train", "val") | {f"{split}.csv": b"file,label\n0.png,cat\n1.png,dog\n" for split in ("train", "val")}
    )
    assert contents(splits) == {"train": [(png(0), "cat"), (png(1), "dog")], "val": [(png(2), "cat"), (png(3), "dog")]}
