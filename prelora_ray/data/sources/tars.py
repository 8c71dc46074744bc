"""Tars whose members are read by their place in the file: ImageNet's archives and WebDataset shards."""

from __future__ import annotations

import functools
import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.source import Item, files_below, numbered_classes
from prelora_ray.storage import Storage


@dataclass(frozen=True)
class Member:
    name: str
    offset: int
    size: int


def members(folder: Storage, file: str, offset: int = 0, size: int | None = None) -> Iterator[Member]:
    """Files in a tar, which itself may lie inside another one, at `offset`.

    Raises ValueError where the tar is cut off or is none.
    """
    stream = _open(folder.uri, file)
    end = stream.size() if size is None else offset + size
    stream.seek(offset)
    try:
        with tarfile.open(fileobj=cast(Any, _Part(stream, offset, end)), mode="r:") as tar:
            for info in tar:
                if info.isfile():
                    if offset + info.offset_data + info.size > end:
                        raise ValueError(f"{folder}/{file} is cut off in the middle of {info.name!r}")
                    yield Member(info.name, offset + info.offset_data, info.size)
    except tarfile.TarError as error:
        raise ValueError(f"{folder}/{file} is no whole tar: {error}") from None


def read_member(root: str, file: str, offset: int, size: int) -> bytes:
    stream = _open(root, file)
    stream.seek(offset)
    return bytes(stream.read(size))


@functools.lru_cache(maxsize=16)
def _open(root: str, file: str) -> Any:
    folder = Storage(root)
    return folder.filesystem.open_input_file(folder.file(file))


class _Part:
    """The bytes from `start` to `end` of a stream, as a file of their own."""

    def __init__(self, stream: Any, start: int, end: int) -> None:
        self._stream = stream
        self._start = start
        self._end = end

    def tell(self) -> int:
        return int(self._stream.tell()) - self._start

    def seek(self, position: int, whence: int = 0) -> int:
        assert whence == 0, "tarfile seeks from the start alone"
        self._stream.seek(min(self._start + position, self._end))
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        left = self._end - int(self._stream.tell())
        return bytes(self._stream.read(left if size < 0 else min(size, left)))


@dataclass(frozen=True)
class WebDataset:
    """Tar shards, each sample a group of members with one stem: an image, and its label in `.cls` or `.json`.

    `root` is a folder of shards, or of `train` and `val` folders of shards; shards whose names begin with
    `val` or `validation` also form the validation split. The label in a `.json` is its `label` or `cls`.
    """

    root: str
    classes: tuple[str, ...]
    items: dict[Split, list[Item]]

    @classmethod
    def open(cls, root: str) -> WebDataset:
        folder = Storage(root)
        items: dict[Split, list[Item]] = {}
        for shard in [name for name in files_below(folder) if name.endswith(".tar")]:
            is_val = any(part.startswith("val") for part in shard.split("/"))
            items.setdefault("val" if is_val else "train", []).extend(_samples(folder, shard))
        if "train" not in items:
            raise ValueError(f"{root!r} has validation shards alone")
        labels = {item.label for found in items.values() for item in found}
        return cls(root, numbered_classes(labels, root), items)

    def read(self, item: Item) -> bytes:
        file, offset, size = item.at
        return read_member(self.root, str(file), int(offset), int(size))


_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


def _samples(folder: Storage, shard: str) -> list[Item]:
    """The samples of one shard, in its order."""
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    for member in members(folder, shard):
        directory, name = posixpath.split(member.name)
        stem, _, ending = name.partition(".")
        stem, ending = posixpath.join(directory, stem), "." + ending.lower()
        if ending in _IMAGES:
            if stem in images:
                raise ValueError(f"{folder}/{shard} has two images of the sample {stem!r}")
            images[stem] = member
        elif ending in (".cls", ".json"):
            content = read_member(folder.uri, shard, member.offset, member.size)
            try:
                label = json.loads(content)
                labels[stem] = int(label if ending == ".cls" else label["label"] if "label" in label else label["cls"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{folder}/{shard} has no whole number as a label in {member.name!r}") from None
    if without := [stem for stem in images if stem not in labels]:
        raise ValueError(f"{folder}/{shard} has no label (.cls or .json) for the sample {without[0]!r}")
    return [Item(f"{shard}/{m.name}", labels[stem], (shard, m.offset, m.size)) for stem, m in images.items()]
