"""Where images come from: what `prelora prepare SOURCE` understands.

A source lists its images without reading them, and reads one when asked, in whatever process it is.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow.fs
from PIL import Image

from prelora_ray.data.manifest import Split
from prelora_ray.storage import Storage


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    name: str
    """What a person calls it: a path relative to the source, or an index."""
    label: int


class Source(Protocol):
    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def items(self) -> dict[Split, list[Item]]:
        """With no "val", a share of "train" is held out."""

    def read(self, item: Item) -> bytes:
        """The image, encoded."""


def open_source(source: str) -> Source:
    """Opens a built-in source (`digits`) or an image-folder tree.

    Raises ValueError where there is no such source, or nothing in it.
    """
    return Digits() if source == "digits" else ImageFolder.open(source)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, inside its wheel."""

    classes: tuple[str, ...] = tuple("0123456789")
    items: dict[Split, list[Item]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = _digits()[1]
        self.items["train"] = [Item(f"{i:04d}", int(label)) for i, label in enumerate(labels)]

    def read(self, item: Item) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(_digits()[0][int(item.name)]).save(buffer, "PNG")
        return buffer.getvalue()


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 and (1797,) labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


@dataclass(frozen=True)
class ImageFolder:
    """A tree of one folder a class, or of `train` and `val` with one folder a class in each.

    Classes are sorted by name, as torchvision's ImageFolder does. Hidden files are passed over.
    """

    root: str
    classes: tuple[str, ...]
    items: dict[Split, list[Item]]

    @classmethod
    def open(cls, root: str) -> ImageFolder:
        """Lists the tree. Raises ValueError where it is no such tree."""
        folder = Storage(root)
        if folder.filesystem.get_file_info(folder.path).type != pyarrow.fs.FileType.Directory:
            raise ValueError(f"{root!r} is no source: give `digits`, or a folder with one folder of images a class")
        top = [name for name in folder.list_folders() if not name.startswith(".")]
        roots: dict[Split, str] = {"train": ""}
        if "train" in top and set(top) <= {"train", "val", "test"}:
            roots = {"train": "train", "val": "val"} if "val" in top else {"train": "train"}
        classes = {split: _folders(folder / root if root else folder) for split, root in roots.items()}
        if not classes["train"]:
            raise ValueError(f"{root!r} has no class folders: put the images of each class into a folder of its name")
        if "val" in classes and (extra := set(classes["val"]) - set(classes["train"])):
            raise ValueError(f"{root!r} has class {sorted(extra)[0]!r} in val but not in train")
        index = {name: label for label, name in enumerate(classes["train"])}
        items = {split: _list_images(folder, root, index) for split, root in roots.items()}
        for split, found in items.items():
            if not found:
                raise ValueError(f"{root!r} has no files in the class folders of {split}")
        return cls(root, tuple(classes["train"]), items)

    def read(self, item: Item) -> bytes:
        return Storage(self.root).read_bytes(item.name)


def _folders(folder: Storage) -> list[str]:
    return [name for name in folder.list_folders() if not name.startswith(".")]


def _list_images(folder: Storage, root: str, classes: dict[str, int]) -> list[Item]:
    selector = pyarrow.fs.FileSelector((folder / root).path if root else folder.path, recursive=True)
    items = []
    for info in folder.filesystem.get_file_info(selector):
        name = info.path[len(folder.path) :].lstrip("/")
        parts = name[len(root) :].lstrip("/").split("/")
        is_visible_file = info.type == pyarrow.fs.FileType.File and not any(part.startswith(".") for part in parts)
        if is_visible_file and len(parts) > 1 and parts[0] in classes:
            items.append(Item(name, classes[parts[0]]))
    return sorted(items, key=lambda item: item.name)
