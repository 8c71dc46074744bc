"""Image folders: one folder of images a class."""

from __future__ import annotations

from dataclasses import dataclass

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.source import Item, files_below, visible_folders
from prelora_ray.storage import Storage


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
        top = visible_folders(folder)
        roots: dict[Split, str] = {"train": ""}
        if "train" in top and set(top) <= {"train", "val", "test"}:
            roots = {"train": "train", "val": "val"} if "val" in top else {"train": "train"}
        classes = {split: visible_folders(folder / name if name else folder) for split, name in roots.items()}
        if not classes["train"]:
            raise ValueError(f"{root!r} has no class folders: put the images of each class into a folder of its name")
        if "val" in classes and (extra := set(classes["val"]) - set(classes["train"])):
            raise ValueError(f"{root!r} has class {sorted(extra)[0]!r} in val but not in train")
        if len(classes["train"]) < 2:
            raise ValueError(f"{root!r} has one class alone, {classes['train'][0]!r}: there is nothing to tell apart")
        items = {split: list_classes(folder, name, classes["train"]) for split, name in roots.items()}
        for split, found in items.items():
            if not found:
                raise ValueError(f"{root!r} has no files in the class folders of {split}")
        return cls(root, tuple(classes["train"]), items)

    def read(self, item: Item) -> bytes:
        return Storage(self.root).read_bytes(item.name)


def list_classes(folder: Storage, root: str, classes: list[str]) -> list[Item]:
    """The files in the class folders below `root`, by name."""
    index = {name: label for label, name in enumerate(classes)}
    items = []
    for name in files_below(folder, root):
        parts = name[len(root) :].lstrip("/").split("/")
        if len(parts) > 1 and parts[0] in index:
            items.append(Item(name, index[parts[0]]))
    return items
