"""Image folders: a folder of images for each class, on a disk, in a bucket or a tar; or images with a table."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from prelora_ray.data.encode import is_image_name
from prelora_ray.data.sources.files import File, printable
from prelora_ray.data.sources.source import Found, Item, Label, Source
from prelora_ray.data.sources.splits import SourceSplit, Splits, used_splits
from prelora_ray.data.sources.table import ENDINGS, Columns, match_files, read_table
from prelora_ray.data.sources.tars import read_member
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage
from prelora_ray.words import counted


@dataclass(frozen=True)
class FileReader:
    """Reads files below `root`, and members of tars there."""

    root: str

    def read(self, item: Item) -> bytes:
        if not item.stamp:
            raise ValueError("it is no file, but a link that leads nowhere or a pipe")
        if len(item.at) == 1:
            return Storage(self.root).read_bytes(str(item.at[0]))
        file, offset, size = item.at
        return read_member(self.root, str(file), int(offset), int(size), item.stamp)


@dataclass(frozen=True)
class Layout:
    """Which folders of a tree are splits and which are classes, by where its images lie."""

    base: str
    """The folder that holds all others; "" is the root."""
    splits: dict[str, SourceSplit | None]
    """The split of each folder in `base`; empty where these are the folders of classes."""
    folders: frozenset[str]
    """Paths of all folders that hold images."""
    by_name: Splits

    @cached_property
    def classes(self) -> frozenset[str]:
        """Paths of class folders that hold images."""
        return frozenset(found for folder in self.folders if (found := self.class_folder(folder)) is not None)

    @classmethod
    def of(cls, files: list[File], splits: Splits) -> Layout:
        folders = {posixpath.dirname(file.path) for file in files if is_image_name(file.path)}
        base = _common_folder(folders, splits)
        of_split = _split_folders(base, [_below(folder, base) for folder in folders if folder != base], splits)
        return cls(base, of_split, frozenset(folders), splits)

    def has_split_inside(self, folder: str) -> bool:
        """Whether a folder that is no split's has a split's name below its class."""
        return any(_split_of(self.by_name, part) for part in _below(folder, self.base).split("/")[1:])

    def top(self, folder: str) -> str | None:
        """The folder in `base` that a folder is or lies in."""
        is_below = folder.startswith(f"{self.base}/") if self.base else folder
        return _below(folder, self.base).split("/")[0] if is_below else None

    def class_folder(self, folder: str) -> str | None:
        """The class folder that a folder is or lies in."""
        top = self.top(folder)
        if top is None:
            return None
        parts = _below(folder, self.base).split("/")
        split = self.splits.get(top)
        depth = 1 if split is None else 2
        while split is not None and len(parts) > depth and _split_of(self.by_name, parts[depth - 1]) == split:
            depth += 1  # a split's folder once more, as in seg_train/seg_train/forest
        return _join(self.base, "/".join(parts[:depth])) if len(parts) >= depth else None


def has_class_folders(files: list[File], splits: Splits) -> bool:
    """Whether images lie in the folders of two classes or more."""
    return len({posixpath.basename(folder) for folder in Layout.of(files, splits).classes}) > 1


def open_folders(root: str, files: list[File], splits: Splits, columns: Columns) -> Source:
    """One folder a class, or split folders with these. Classes are sorted by name, as torchvision's ImageFolder does.

    A folder without a file that claims to be an image is no class. A split folder without class folders may have a
    table of its files' labels in it. Raises UserError where the files are no such tree.
    """
    found = Found("image folders", root, splits)
    layout = Layout.of(files, splits)
    tables = {
        top: _table_in(root, files, layout, top, columns, found.notes)
        for top, split in layout.splits.items()
        if split is not None
    }
    left_out: Counter[str] = Counter()
    for file in files:
        folder = posixpath.dirname(file.path)
        top = layout.top(folder) or ""
        label: Label | None = None
        if table := tables.get(top):
            given, reason = table.get(file.path), "not in the table of its folder"
            label = None if given is None else str(given)  # as the folders of the other splits name it
        elif (class_folder := layout.class_folder(folder)) is None:
            reason = "in no class folder"
        elif class_folder not in layout.classes:
            reason = "in a folder without images"
        else:
            label = posixpath.basename(class_folder)
        if label is None:
            found.skip(reason, file.path)
            continue
        split = layout.splits.get(top) or (splits.of(str(file.at[0])) if file.at else None)
        left_out[top] += split is None
        add_file(found, split, file, label)
    if not layout.splits and (inner := next((name for name in sorted(layout.folders) if layout.has_split_inside(name)), None)):
        raise UserError(
            f"{root!r} has a split's folder inside of what looks like a class, {printable(inner)!r}: give the folder that "
            "holds the splits, or put the splits above the classes"
        )
    if not found.has_images_of("train", None):
        raise UserError(f"{root!r} has no class folders: put the images of each class into a folder of its name")
    for top, split in layout.splits.items():
        if split == "val" and not found.has_images_of("val"):
            raise UserError(
                f"{root!r} has images without labels in {top}: sort them into class folders, or add a table of file and label"
            )
    if "train" in layout.splits.values() and None in layout.splits.values():
        names = ", ".join(f"{printable(name)} ({counted(count, 'file')})" for name, count in left_out.most_common(5) if count)
        found.notes.append(f"folders of no split are left out: {names}")
    return found.source(FileReader(root))


def open_table(root: str, files: list[File], tables: list[str], splits: Splits, columns: Columns) -> Source:
    """Images and one table of their labels for each split. Raises UserError where a table is none, or fits no image."""
    folder = Storage(root)
    found = Found("images and a table of their labels", root, splits)
    by_split: dict[SourceSplit | None, str] = {}
    for name in tables:
        other = by_split.setdefault(splits.of(name), name)
        if other != name:
            raise UserError(f"{root!r} has the tables {other!r} and {name!r} for one split: give one of them as the source")
    labeled: set[str] = set()
    images = [file for file in files if is_image_name(file.path)]
    used = used_splits(by_split)
    for split, name in by_split.items():
        if split not in used:
            continue
        own = [file for file in images if splits.of(file.path) == split] if split else []
        labels, missing = match_files(read_table(folder, name, columns, found.notes), name, own or images)
        for file in images:
            if file.path in labels:
                add_file(found, split, file, labels[file.path])
        labeled |= labels.keys()
        for file_name in missing:
            found.skip("in a table, but not there", file_name)
    for file in files:
        if file.path not in labeled and file.path not in tables:
            found.skip("in no table", file.path)
    return found.source(FileReader(root))


def add_file(found: Found, split: SourceSplit | None, file: File, label: Label) -> None:
    found.add(split, file.name, label, file.at or (file.path,), file.block, file.stamp)


def table_files(files: Iterable[File]) -> list[str]:
    return [file.path for file in files if file.path.lower().endswith(ENDINGS)]


def _common_folder(folders: set[str], splits: Splits) -> str:
    """The deepest folder that all images lie below, down to the folders of splits and of classes."""
    base = ""
    while len(tops := {_below(folder, base).split("/")[0] for folder in folders}) == 1:
        (top,) = tops
        inner = _join(base, top)
        if _split_of(splits, inner) is not None or not all(folder.startswith(f"{inner}/") for folder in folders):
            break
        base = inner
    return base


def _split_of(splits: Splits, folder: str) -> SourceSplit | None:
    """The split that a folder's name names; None also where it names two, as `train_test_split` does."""
    try:
        return splits.of(folder)
    except ValueError:
        return None


def _split_folders(base: str, folders: list[str], splits: Splits) -> dict[str, SourceSplit | None]:
    """The split of each top folder, given the paths of folders with images; empty where the top folders are classes.

    A folder that is named after a split is one if folders lie in it, or if another folder is named after another split.
    So a class of railway trains in a folder `train` stays a class.
    """
    names = {folder.split("/")[0] for folder in folders}
    tops = {name: _split_of(splits, _join(base, name)) for name in sorted(names)}
    deep = {folder.split("/")[0] for folder in folders if "/" in folder}
    if all(tops.values()) or len(set(tops.values()) - {None}) > 1 or any(tops[top] is not None for top in deep):
        return tops
    return {}


def _table_in(
    root: str, files: list[File], layout: Layout, top: str, columns: Columns, notes: list[str]
) -> dict[str, Label] | None:
    """{path: label} by a table in a split's folder without class folders, as in tiny-imagenet; None without one."""
    folder = _join(layout.base, top)
    if sum(name.startswith(f"{folder}/") for name in layout.classes) > 1:
        return None
    inside = [file for file in files if file.path.startswith(f"{folder}/") and not file.at]
    here = [file.path for file in inside if posixpath.dirname(file.path) == folder]
    tables = [name for name in here if name.lower().endswith((*ENDINGS, "annotations.txt"))]
    if len(tables) != 1:
        return None
    images = [file for file in inside if is_image_name(file.path)]
    return match_files(read_table(Storage(root), tables[0], columns, notes), tables[0], images)[0]


def _below(folder: str, base: str) -> str:
    """A folder's path relative to `base`, which it is or in which it lies."""
    return folder[len(base) + 1 :] if base else folder


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name
