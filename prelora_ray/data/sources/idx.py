"""IDX files, the format of MNIST and Fashion-MNIST, gzipped or not."""

from __future__ import annotations

import functools
import gzip
import io
import math
import posixpath
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from prelora_ray.data.sources.class_names import class_names
from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.source import Found, Item, Source
from prelora_ray.data.sources.splits import SourceSplit
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage
from prelora_ray.words import counted

_MOST_UNPACKED = 4 * 2**30
"""Bytes that a gzipped file may have unpacked, whatever its header says."""
_PREFIX: dict[SourceSplit, str] = {"train": "train", "test": "t10k"}


def has_idx(files: list[File]) -> bool:
    return bool(_folders(files))


def open_idx(root: str, files: list[File]) -> Source:
    """`train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and the same of `t10k`, which validates, in one folder.

    Numbers are named by `classnames.txt` in the source, a line a class. Raises UserError where a file is missing,
    damaged, or does not fit its pair, or where several folders have such files.
    """
    found = Found("IDX files", root)
    folders = _folders(files)
    if len(folders) > 1:
        raise UserError(f"{root!r} has IDX files in {' and in '.join(map(repr, folders))}: give one of these folders")
    here = [file for file in files if posixpath.dirname(file.path) == folders[0]]
    taken = set()
    for split, prefix in _PREFIX.items():
        if split == "test" and not any(posixpath.basename(file.path).startswith(prefix) for file in here):
            continue
        of_images, of_labels = _one(root, here, f"{prefix}-images", 3), _one(root, here, f"{prefix}-labels", 1)
        images, labels = (_array(root, file.path, ndim, file.stamp) for file, ndim in ((of_images, 3), (of_labels, 1)))
        if len(images) != len(labels):
            raise UserError(f"{root!r} has {counted(len(images), 'image')} and {counted(len(labels), 'label')} of {prefix}")
        for i, label in enumerate(labels):
            found.add(split, f"{prefix}/{i}", int(label), (of_images.path, i), stamp=of_images.stamp)
        taken |= {of_images.path, of_labels.path}
    for file in files:
        if file.path not in taken:
            found.skip("no IDX file of these sets", file.path)
    return found.source(IdxReader(root), class_names(Storage(root)))


@dataclass(frozen=True)
class IdxReader:
    root: str

    def read(self, item: Item) -> bytes:
        file, i = item.at
        buffer = io.BytesIO()
        Image.fromarray(_array(self.root, str(file), 3, item.stamp)[int(i)]).save(buffer, "PNG")
        return buffer.getvalue()


def _folders(files: list[File]) -> list[str]:
    """The folders that hold training images."""
    names = [posixpath.split(file.path) for file in files]
    return sorted({folder for folder, name in names if name.startswith("train-images") and "idx3" in name})


def _one(root: str, files: list[File], prefix: str, ndim: int) -> File:
    """The file whose name begins with `prefix`; the unpacked one where both are there, as torchvision leaves them."""
    fitting = {
        file.path.removesuffix(".gz"): file
        for file in reversed(files)
        if posixpath.basename(file.path).startswith(prefix) and f"idx{ndim}" in posixpath.basename(file.path)
    }
    if len(fitting) != 1:
        raise UserError(
            f"{root!r} has {len(fitting) or 'no'} files {prefix}-idx{ndim}-ubyte: there must be one, gzipped or not"
        )
    (file,) = fitting.values()
    return file


@functools.lru_cache(maxsize=4)
def _array(root: str, name: str, ndim: int, stamp: str) -> np.ndarray:
    """The uint8 array of a file; one with another `stamp` is another file."""
    folder = Storage(root)
    content = folder.read_bytes(name)
    is_gzipped = content[:2] == b"\x1f\x8b"
    try:
        with gzip.open(io.BytesIO(content)) if is_gzipped else io.BytesIO(content) as file:
            header = np.frombuffer(file.read(4 * (1 + ndim)), ">u4", 1 + ndim)
            if header[0] != 0x0800 + ndim:
                raise ValueError("wrong magic number")
            shape = tuple(int(side) for side in header[1:])
            if math.prod(shape) > (_MOST_UNPACKED if is_gzipped else len(content)):
                raise ValueError(
                    f"its header says {counted(math.prod(shape), 'byte')}, more than "
                    f"{'are unpacked' if is_gzipped else 'it has'}"
                )
            pixels = file.read(math.prod(shape) + 1)  # no more than one byte too many, however many a bomb would yield
        return np.frombuffer(pixels, np.uint8).reshape(shape)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{folder}/{name} is no whole IDX file of {ndim} dimensions: {error}") from None
