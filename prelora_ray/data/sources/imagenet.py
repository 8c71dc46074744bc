"""ImageNet-1k (ILSVRC2012) as people have it, without unpacking anything."""

from __future__ import annotations

import csv
import gzip
import io
import posixpath
import tarfile
import zlib

from prelora_ray.data.encode import is_image_name
from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.folder import FileReader, add_file
from prelora_ray.data.sources.source import Found, Source
from prelora_ray.data.sources.tars import members
from prelora_ray.errors import UserError, one_line
from prelora_ray.storage import Storage
from prelora_ray.words import counted

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
KAGGLE = "ILSVRC/Data/CLS-LOC/"
_MOST_UNPACKED = 64 * 2**20
"""Bytes of a devkit, of which ImageNet's own has a few million."""
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def is_imagenet(files: list[File]) -> bool:
    """Whether the files look like ImageNet's archives, Kaggle's tree, or class folders and a flat `val` with labels."""
    paths = {file.path for file in files}
    if paths & {TRAIN_TAR, VAL_TAR} or any(path.startswith(KAGGLE + "train/") for path in paths):
        return True
    has_labels = SOLUTION in paths or any(path.startswith(DEVKIT) for path in paths)
    return has_labels and all(any(path.startswith(folder) for path in paths) for folder in ("train/", "val/"))


def open_imagenet(root: str, files: list[File]) -> Source:
    """Training images from the tar of tars or a `train` folder of class folders; validation images from their tar or a
    flat `val` folder, with labels from Kaggle's `LOC_val_solution.csv` or the devkit (a folder, or its `.tar.gz`). Both
    folders may lie in Kaggle's `ILSVRC/Data/CLS-LOC`.

    Classes are WordNet ids, sorted. Raises UserError where a part is missing or does not fit the others.
    """
    folder = Storage(root)
    found = Found("ImageNet", root)
    by_path = {file.path: file for file in files}
    base = KAGGLE if any(file.path.startswith(KAGGLE) for file in files) else ""
    train = {file.path: file for file in files if file.path.startswith(f"{base}train/")}
    if TRAIN_TAR in by_path:
        _add_train_tar(found, folder, by_path[TRAIN_TAR])
    elif train:
        for file in train.values():
            parts = file.path[len(base) :].split("/")
            if len(parts) > 2:
                add_file(found, "train", file, parts[1])
            else:
                found.skip("in no class folder", file.path)
    else:
        raise UserError(f"{root!r} has neither {TRAIN_TAR} nor a folder train")
    if VAL_TAR in by_path:
        val = list(members(folder, by_path[VAL_TAR]))
    else:
        val = [file for file in files if file.path.startswith(f"{base}val/")]
    if val:
        _add_val(found, folder, by_path, val)
    taken = {TRAIN_TAR, VAL_TAR, SOLUTION, f"{DEVKIT}.tar.gz", *train, *(file.path for file in val)}
    for file in files:
        if file.path not in taken and not file.path.startswith(f"{DEVKIT}/"):
            found.skip("no part of ImageNet's training or validation images", file.path)
    return found.source(FileReader(root))


def _add_train_tar(found: Found, folder: Storage, archive: File) -> None:
    """Images of the tar of tars, by the WordNet ids that the inner ones are named by."""
    inner = sorted(members(folder, archive), key=lambda member: member.path)
    if not inner or not all(member.path.endswith(".tar") for member in inner):
        raise UserError(f"{folder}/{TRAIN_TAR} is not the tar of one tar a class that ImageNet is")
    for tar in inner:
        wnid = posixpath.basename(tar.path).removesuffix(".tar")
        _, offset, size = tar.at
        for member in members(folder, archive, int(offset), int(size)):
            found.add("train", f"{wnid}/{member.path}", wnid, member.at, stamp=member.stamp)


def _add_val(found: Found, folder: Storage, files: dict[str, File], images: list[File]) -> None:
    """Validation images, in the order of their names."""
    named = {posixpath.splitext(posixpath.basename(file.path))[0]: file for file in images if is_image_name(file.path)}
    for file in images:
        if not is_image_name(file.path):
            found.skip("no image", file.path)
    wnids = _wnids_by_solution(folder) if SOLUTION in files else _wnids_by_devkit(folder, files, sorted(named))
    for name in sorted(named):
        if name not in wnids:
            raise UserError(f"{folder}: no label is given for the validation image {named[name].path!r}")
        add_file(found, "val", named[name], wnids[name])


def _wnids_by_solution(folder: Storage) -> dict[str, str]:
    """{image name without ending: WordNet id} from Kaggle's table: ImageId, PredictionString ("n0144076 x y ...")."""
    content = folder.read_bytes(SOLUTION)
    try:
        rows = csv.DictReader(io.StringIO(content.decode()))
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (ValueError, KeyError, IndexError, AttributeError):
        raise UserError(f"{folder}/{SOLUTION} is not a table of ImageId and PredictionString") from None


def _wnids_by_devkit(folder: Storage, files: dict[str, File], names: list[str]) -> dict[str, str]:
    """The same from the devkit, whose i-th line is the ILSVRC2012_ID of the i-th image by name."""
    truth, meta = _devkit_files(folder, files)
    from scipy.io import loadmat

    try:
        numbers = [int(line) for line in truth.decode().split()]
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        labels = [wnids[number] for number in numbers]
    except Exception as error:  # whatever a damaged file makes scipy raise
        raise UserError(f"{folder}: its devkit is damaged: {type(error).__name__}: {one_line(error)}") from None
    if len(labels) != len(names):
        raise UserError(f"{folder}: the devkit labels {counted(len(labels), 'validation image')}, and there are {len(names)}")
    return dict(zip(names, labels, strict=True))


def _devkit_files(folder: Storage, files: dict[str, File]) -> tuple[bytes, bytes]:
    archive = f"{DEVKIT}.tar.gz"
    if archive in files:
        contents = _unpacked(folder, archive)
        truth, meta = (contents.get(name) for name in (_TRUTH, _META))
    else:
        names = [f"{DEVKIT}/data/{name}" for name in (_TRUTH, _META)]
        truth, meta = (folder.read_bytes(name) if name in files else None for name in names)
    if truth is None or meta is None:
        raise UserError(f"{folder} has no labels of the validation images: put {SOLUTION} or {archive} beside them")
    return truth, meta


def _unpacked(folder: Storage, archive: str) -> dict[str, bytes]:
    """What is needed of the devkit's archive, by name."""
    try:
        with gzip.open(io.BytesIO(folder.read_bytes(archive))) as file:
            plain = file.read(_MOST_UNPACKED + 1)  # no more, however much a bomb would yield
        if len(plain) > _MOST_UNPACKED:
            raise ValueError(f"it has more than the {_MOST_UNPACKED:,} bytes of a devkit")
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            # A sparse file claims more bytes than the tar has.
            found = {posixpath.basename(m.name): m for m in tar if m.isfile() and m.size <= len(plain)}
            opened = {name: tar.extractfile(found[name]) for name in (_TRUTH, _META) if name in found}
            return {name: content.read() for name, content in opened.items() if content is not None}
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{folder}/{archive} is no devkit: {error}") from None
