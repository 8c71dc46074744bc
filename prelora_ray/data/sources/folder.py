"""Image folders: one folder of images a class, on a disk, in a bucket or in a tar; or images and a table of their labels."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from prelora_ray.data.encode import is_image_name
from prelora_ray.data.sources.files import File, printable
from prelora_ray.data.sources.source import Found, Item, Label, Source
from prelora_ray.data.sources.splits import SourceSplit, Splits
from prelora_ray.data.sources.table import ENDINGS, Columns, match_files, read_table
from prelora_ray.data.sources.tars import read_member
from prelora_ray.storage import Storage

NO_LINK = "a link that leads nowhere"


@dataclass(frozen=True)
class FileReader:
    """Reads files below `root`, and members of tars there."""

    root: str

    def read(self, item: Item) -> bytes:
        if len(item.at) == 1:
            if not item.stamp:
                raise ValueError(f"it is {NO_LINK}")
            return Storage(self.root).read_bytes(str(item.at[0]))
        file, offset, size = item.at
        return read_member(self.root, str(file), int(offset), int(size), item.stamp)


def open_folders(root: str, files: list[File], splits: Splits, columns: Columns) -> Source:
    """One folder a class, or split folders with these. Classes are sorted by name, as torchvision's ImageFolder does.

    A folder without a file that claims to be an image is no class. A split folder without class folders may have a table of
    its files' labels in it. Raises ValueError where the files are no such tree.
    """
    found = Found("image folders", root)
    base = _common_folder(files, splits)
    of_split = _split_folders(files, base, splits)
    tables = {top: _table_in(root, files, _join(base, top), columns) for top, split in of_split.items() if split}
    with_images = {_class_folder(file, base, of_split) for file in files if is_image_name(file.path)}
    left_out: Counter[str] = Counter()
    for file in files:
        top = _below(file, base).split("/")[0] if _is_below(file, base) else None
        table = tables.get(top) if top is not None else None
        if table is not None:
            label: Label | None = table.get(file.path)
            reason = "not in the table of its folder"
        else:
            folder = _class_folder(file, base, of_split)
            is_class = folder is not None and folder in with_images
            label = posixpath.basename(folder) if folder is not None and is_class else None
            reason = "in no class folder" if folder is None else "in a folder without images"
        split = of_split.get(top) if top is not None else None
        if label is None:
            found.skip(reason, file.path)
        else:
            if split is None and any(of_split.values()):
                left_out[str(top)] += 1
            add_file(found, split, file, label)
    if not found.has_images_of("train", None):
        raise ValueError(f"{root!r} has no class folders: put the images of each class into a folder of its name")
    for top, split in of_split.items():
        if split == "val" and not found.has_images_of("val"):
            raise ValueError(
                f"{root!r} has images without labels in {top}: sort them into class folders, or add a table of file and label"
            )
    if left_out and "train" in of_split.values():
        names = ", ".join(f"{printable(name)} ({count:,} files)" for name, count in left_out.most_common(5))
        found.notes.append(f"folders of no split are left out: {names}")
    return found.source(FileReader(root))


def has_class_folders(files: list[File], splits: Splits) -> bool:
    """Whether images lie in the folders of two classes or more."""
    base = _common_folder(files, splits)
    of_split = _split_folders(files, base, splits)
    images = [file for file in files if is_image_name(file.path)]
    return len({posixpath.basename(folder) for file in images if (folder := _class_folder(file, base, of_split))}) > 1


def open_table(root: str, files: list[File], tables: list[str], splits: Splits, columns: Columns) -> Source:
    """Images and one table of their labels for each split. Raises ValueError where a table is none, or fits no image."""
    folder = Storage(root)
    found = Found("images and a table of their labels", root)
    by_split: dict[SourceSplit | None, str] = {}
    for name in tables:
        other = by_split.setdefault(splits.of(name), name)
        if other != name:
            raise ValueError(f"{root!r} has the tables {other!r} and {name!r} for one split: give one of them as the source")
    labeled: set[str] = set()
    images = [file for file in files if is_image_name(file.path)]
    for split, name in by_split.items():
        labels, missing = match_files(read_table(folder, name, columns), posixpath.dirname(name), images)
        if not labels:
            raise ValueError(f"{folder}/{name} names {missing[0]!r}, and no such file is there, nor any other of its files")
        for file in images:
            if file.path in labels:
                add_file(found, split, file, labels[file.path])
        labeled |= labels.keys()
        for _ in missing:
            found.skip("in a table, but not there", name)
    for file in files:
        if file.path not in labeled and file.path not in tables:
            found.skip("in no table", file.path)
    return found.source(FileReader(root))


def add_file(found: Found, split: SourceSplit | None, file: File, label: Label) -> None:
    found.add(split, file.name, label, file.at or (file.path,), file.block, file.stamp)


def table_files(files: Iterable[File]) -> list[str]:
    return [file.path for file in files if file.path.lower().endswith(ENDINGS)]


def _common_folder(files: list[File], splits: Splits) -> str:
    """The deepest folder that holds all images, down to the folders of splits and of classes."""
    folders = [posixpath.dirname(file.path) for file in files if is_image_name(file.path)]
    base: list[str] = []
    for level in zip(*(folder.split("/") for folder in folders), strict=False):
        deeper = any("/" in folder[len("/".join([*base, level[0]])) :] for folder in folders)
        if len(set(level)) > 1 or not deeper or splits.of(level[0]) is not None or not level[0]:
            break
        base.append(level[0])
    return "/".join(base)


def _split_folders(files: list[File], base: str, splits: Splits) -> dict[str, SourceSplit | None]:
    """The split of each folder in `base`; empty where these are the folders of classes.

    A folder whose name says so is a split's if folders lie in it; or if all folders here are splits'. So a class of railway
    trains in a folder `train` stays one.
    """
    images = [_below(file, base).split("/") for file in files if _is_below(file, base) and is_image_name(file.path)]
    tops = {parts[0]: splits.of(parts[0]) for parts in images if len(parts) > 1}
    deep = {parts[0] for parts in images if len(parts) > 2}
    if tops and (all(tops.values()) or any(tops[top] is not None for top in deep)):
        return tops
    return {}


def _class_folder(file: File, base: str, of_split: dict[str, SourceSplit | None]) -> str | None:
    """Path of the class folder that a file lies in."""
    if not _is_below(file, base):
        return None
    parts = _below(file, base).split("/")
    depth = 2 if of_split.get(parts[0]) is not None else 1
    return _join(base, "/".join(parts[:depth])) if len(parts) > depth else None


def _table_in(root: str, files: list[File], folder: str, columns: Columns) -> dict[str, Label] | None:
    """{path: label} by a table in a split's folder without class folders, as tiny-imagenet has it; None where there is none."""
    inside = [file for file in files if file.path.startswith(folder + "/")]
    if len({posixpath.dirname(file.path) for file in inside if is_image_name(file.path)}) > 1:
        return None  # class folders
    here = [file for file in inside if posixpath.dirname(file.path) == folder and not file.at]
    tables = [file.path for file in here if file.path.lower().endswith((*ENDINGS, "annotations.txt"))]
    if len(tables) != 1:
        return None
    images = [file for file in inside if is_image_name(file.path)]
    labels, missing = match_files(read_table(Storage(root), tables[0], columns), folder, images)
    if not labels:
        raise ValueError(f"{root}/{tables[0]} names {missing[0]!r}, and no such file is there, nor any other of its files")
    return labels


def _is_below(file: File, base: str) -> bool:
    return not base or file.path.startswith(base + "/")


def _below(file: File, base: str) -> str:
    return file.path[len(base) :].lstrip("/")


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name
