"""IDX files, the format of MNIST and Fashion-MNIST, gzipped or not."""

from __future__ import annotations

import functools
import gzip
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.source import Item, numbered_classes
from prelora_ray.storage import Storage

_PREFIX: dict[Split, str] = {"train": "train", "val": "t10k"}


@dataclass(frozen=True)
class Idx:
    """A folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and the same of `t10k`, which validates."""

    root: str
    classes: tuple[str, ...]
    items: dict[Split, list[Item]]

    @classmethod
    def fits(cls, folder: Storage) -> bool:
        return any(name.startswith("train-images") and "idx3" in name for name in folder.list_files())

    @classmethod
    def open(cls, root: str) -> Idx:
        """Raises ValueError where a file is missing, damaged, or does not fit its pair."""
        items: dict[Split, list[Item]] = {}
        for split, prefix in _PREFIX.items():
            if split == "val" and not any(name.startswith(prefix) for name in Storage(root).list_files()):
                continue
            images, labels = _array(root, f"{prefix}-images", 3), _array(root, f"{prefix}-labels", 1)
            if len(images) != len(labels):
                raise ValueError(f"{root!r} has {len(images)} images and {len(labels)} labels of {prefix}")
            items[split] = [Item(f"{prefix}/{i}", int(label), (prefix, i)) for i, label in enumerate(labels)]
        return cls(root, numbered_classes((item.label for found in items.values() for item in found), root), items)

    def read(self, item: Item) -> bytes:
        prefix, i = item.at
        buffer = io.BytesIO()
        Image.fromarray(_array(self.root, f"{prefix}-images", 3)[int(i)]).save(buffer, "PNG")
        return buffer.getvalue()


@functools.lru_cache(maxsize=4)
def _array(root: str, prefix: str, ndim: int) -> np.ndarray:
    """The uint8 array in the one file whose name begins with `prefix`."""
    folder = Storage(root)
    names = [name for name in folder.list_files() if name.startswith(prefix) and f"idx{ndim}" in name]
    if len(names) != 1:
        raise ValueError(f"{root!r} has {len(names) or 'no'} files {prefix}-idx{ndim}-ubyte: there must be one, gzipped or not")
    content = folder.read_bytes(names[0])
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        header = np.frombuffer(content, ">i4", 1 + ndim)
        if header[0] != 0x0800 + ndim:
            raise ValueError("wrong magic number")
        return np.frombuffer(content, np.uint8, offset=4 * len(header)).reshape(tuple(header[1:]))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{folder}/{names[0]} is no whole IDX file of {ndim} dimensions: {error}") from None
