"""ImageNet-1k (ILSVRC2012) as people have it, without unpacking anything."""

from __future__ import annotations

import csv
import io
import posixpath
import tarfile
from dataclasses import dataclass

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.folder import list_classes
from prelora_ray.data.sources.source import Item, files_below, is_folder, visible_folders
from prelora_ray.data.sources.tars import members, read_member
from prelora_ray.storage import Storage

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@dataclass(frozen=True)
class ImageNet:
    """Training images from the tar of tars or a `train` folder of class folders; validation images from their tar or
    a flat `val` folder, with labels from Kaggle's `LOC_val_solution.csv` or the devkit (a folder, or its `.tar.gz`).

    Classes are WordNet ids, sorted.
    """

    root: str
    classes: tuple[str, ...]
    items: dict[Split, list[Item]]

    @classmethod
    def fits(cls, folder: Storage) -> bool:
        """Whether the folder looks like ImageNet's archives, or has a flat `val`."""
        files = folder.list_files()
        if TRAIN_TAR in files or VAL_TAR in files:
            return True
        has_labels = SOLUTION in files or f"{DEVKIT}.tar.gz" in files or is_folder(folder / DEVKIT)
        return has_labels and is_folder(folder / "val") and is_folder(folder / "train")

    @classmethod
    def open(cls, root: str) -> ImageNet:
        """Lists the archives. Raises ValueError where a part is missing or does not fit the others."""
        folder = Storage(root)
        files = folder.list_files()
        if TRAIN_TAR in files:
            classes, train = _train_tar(folder)
        elif is_folder(folder / "train"):
            classes = visible_folders(folder / "train")
            train = list_classes(folder, "train", classes)
        else:
            raise ValueError(f"{root!r} has neither {TRAIN_TAR} nor a folder train")
        if not train:
            raise ValueError(f"{root!r} has no training images")
        items: dict[Split, list[Item]] = {"train": train}
        if VAL_TAR in files:
            names = {posixpath.basename(m.name): (VAL_TAR, m.offset, m.size) for m in members(folder, VAL_TAR)}
            items["val"] = _label(folder, classes, {name: (f"{VAL_TAR}/{name}", at) for name, at in names.items()})
        elif is_folder(folder / "val"):
            found = files_below(folder, "val")
            items["val"] = _label(folder, classes, {posixpath.basename(name): (name, ()) for name in found})
        return cls(root, tuple(classes), items)

    def read(self, item: Item) -> bytes:
        if not item.at:
            return Storage(self.root).read_bytes(item.name)
        file, offset, size = item.at
        return read_member(self.root, str(file), int(offset), int(size))


def _train_tar(folder: Storage) -> tuple[list[str], list[Item]]:
    """WordNet ids and images of the tar of tars."""
    inner = sorted(members(folder, TRAIN_TAR), key=lambda member: member.name)
    if not inner or not all(member.name.endswith(".tar") for member in inner):
        raise ValueError(f"{folder}/{TRAIN_TAR} is not the tar of one tar a class that ImageNet is")
    classes = [posixpath.basename(member.name).removesuffix(".tar") for member in inner]
    items = []
    for label, tar in enumerate(inner):
        for member in members(folder, TRAIN_TAR, tar.offset, tar.size):
            items.append(Item(f"{classes[label]}/{member.name}", label, (TRAIN_TAR, member.offset, member.size)))
    return classes, items


def _label(folder: Storage, classes: list[str], images: dict[str, tuple[str, tuple[str | int, ...]]]) -> list[Item]:
    """Validation items from {file name: (name, where it is)}, in the order of the file names."""
    wnids = _wnids_by_solution(folder) if SOLUTION in folder.list_files() else _wnids_by_devkit(folder, sorted(images))
    index = {name: label for label, name in enumerate(classes)}
    items = []
    for file in sorted(images):
        wnid = wnids.get(posixpath.splitext(file)[0])
        if wnid is None:
            raise ValueError(f"{folder}: no label is given for the validation image {file!r}")
        if wnid not in index:
            raise ValueError(f"{folder}: validation image {file!r} is of class {wnid!r}, which has no training images")
        name, at = images[file]
        items.append(Item(name, index[wnid], at))
    return items


def _wnids_by_solution(folder: Storage) -> dict[str, str]:
    """{image name without ending: WordNet id} from Kaggle's table: `ImageId,PredictionString` with "n0144076 x y ..."."""
    rows = csv.DictReader(io.StringIO(folder.read_bytes(SOLUTION).decode()))
    try:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, IndexError, AttributeError):
        raise ValueError(f"{folder}/{SOLUTION} is not a table of ImageId and PredictionString") from None


def _wnids_by_devkit(folder: Storage, files: list[str]) -> dict[str, str]:
    """The same from the devkit, whose i-th line is the ILSVRC2012_ID of the i-th image by name."""
    truth, meta = _devkit_files(folder)
    numbers = [int(line) for line in truth.decode().split()]
    if len(numbers) != len(files):
        raise ValueError(f"{folder}: the devkit labels {len(numbers)} validation images, and there are {len(files)}")
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    return {posixpath.splitext(file)[0]: wnids[number] for file, number in zip(files, numbers, strict=True)}


def _devkit_files(folder: Storage) -> tuple[bytes, bytes]:
    archive = f"{DEVKIT}.tar.gz"
    if archive in folder.list_files():
        with tarfile.open(fileobj=io.BytesIO(folder.read_bytes(archive))) as tar:
            found = {posixpath.basename(m.name): tar.extractfile(m) for m in tar if m.isfile()}
            contents = [found.get(name) for name in (_TRUTH, _META)]
            truth, meta = (content.read() if content else None for content in contents)
    else:
        data = folder / DEVKIT / "data"
        truth, meta = (data.read_bytes(name) if data.exists(name) else None for name in (_TRUTH, _META))
    if truth is None or meta is None:
        raise ValueError(f"{folder} has no labels of the validation images: put {SOLUTION} or {archive} beside them")
    return truth, meta
