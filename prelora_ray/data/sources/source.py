"""What every source of images is to `prepare`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import pyarrow.fs

from prelora_ray.data.manifest import Split
from prelora_ray.storage import Storage


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    name: str
    """What a person calls it: a path relative to the source, a member of a tar, a row."""
    label: int
    at: tuple[str | int, ...] = ()
    """Where the source finds it, where the name does not say."""
    block: int | None = None
    """Number of the unit that is read at once (a Parquet row group); None where any image is as cheap to read as any other."""


class Source(Protocol):
    """Lists its images without reading them, and reads one when asked, in whatever process it is."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""

    @property
    def items(self) -> dict[Split, list[Item]]:
        """With no "val", a share of "train" is held out."""

    def read(self, item: Item) -> bytes:
        """The image, encoded."""


def is_folder(folder: Storage) -> bool:
    return bool(folder.filesystem.get_file_info(folder.path).type == pyarrow.fs.FileType.Directory)


def files_below(folder: Storage, root: str = "") -> list[str]:
    """Paths relative to `folder` of all files below its sub-folder `root`, sorted; hidden files are passed over."""
    selector = pyarrow.fs.FileSelector((folder / root).path if root else folder.path, recursive=True)
    names = []
    for info in folder.filesystem.get_file_info(selector):
        name = info.path[len(folder.path) :].lstrip("/")
        inside = name[len(root) :].lstrip("/").split("/")
        if info.type == pyarrow.fs.FileType.File and not any(part.startswith(".") for part in inside):
            names.append(name)
    return sorted(names)


def visible_folders(folder: Storage) -> list[str]:
    return [name for name in folder.list_folders() if not name.startswith(".")]


def numbered_classes(labels: Iterable[int], source: str) -> tuple[str, ...]:
    """Classes of a source that knows numbers alone: "0" to the largest label.

    Raises ValueError for a label under 0.
    """
    found = set(labels)
    if found and min(found) < 0:
        raise ValueError(f"{source!r} has label {min(found)}: labels are whole numbers from 0 on")
    return tuple(str(label) for label in range(max(found, default=-1) + 1))
