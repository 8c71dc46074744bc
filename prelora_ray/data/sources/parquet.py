"""Parquet files in the Hugging Face layout."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.source import Item, files_below, numbered_classes
from prelora_ray.storage import Storage


@dataclass(frozen=True)
class HuggingFaceParquet:
    """Files with a column `image` or `img` (a struct of `bytes` and `path`, or plain bytes) and a column `label`.

    The files of a split begin with its name (`train-00000-of-00005.parquet`), or lie in a folder of that name; `val`,
    `validation` and, where there is neither, `test` validate. Class names come from the files' own metadata, or are
    numbers.
    """

    root: str
    classes: tuple[str, ...]
    items: dict[Split, list[Item]]

    @classmethod
    def fits(cls, folder: Storage) -> bool:
        return any(name.endswith(".parquet") for name in files_below(folder))

    @classmethod
    def open(cls, root: str) -> HuggingFaceParquet:
        """Lists rows and labels. Raises ValueError where a file is damaged or lacks a column."""
        folder = Storage(root)
        files = [name for name in files_below(folder) if name.endswith(".parquet")]
        splits = {split: [name for name in files if any(p.startswith(split) for p in name.split("/"))] for split in _SPLITS}
        val = splits["val"] or splits["test"]
        train = splits["train"] or [name for name in files if name not in splits["val"] + splits["test"]]
        if not train:
            raise ValueError(f"{root!r} has no Parquet files to train on")
        items: dict[Split, list[Item]] = {}
        block = 0
        names: tuple[str, ...] | None = None
        chosen: list[tuple[Split, str]] = [("train", name) for name in train] + [("val", name) for name in val]
        for split, file in chosen:
            parquet = _open(root, file)
            names = names or _class_names(parquet.schema_arrow)
            for group in range(parquet.num_row_groups):
                labels = parquet.read_row_group(group, columns=["label"])["label"].to_pylist()
                if not all(isinstance(label, int) for label in labels):
                    raise ValueError(f"{folder}/{file} has a label that is no whole number")
                items.setdefault(split, []).extend(
                    Item(f"{file}/{group}/{row}", label, (file, group, row), block) for row, label in enumerate(labels)
                )
                block += 1
        numbers = numbered_classes((item.label for found in items.values() for item in found), root)
        if names and len(numbers) > len(names):
            raise ValueError(f"{root!r} has label {len(numbers) - 1}, and its metadata names {len(names)} classes")
        return cls(root, names or numbers, items)

    def read(self, item: Item) -> bytes:
        file, group, row = item.at
        content = _images(self.root, str(file), int(group))[int(row)].as_py()
        if isinstance(content, dict):
            content = content["bytes"]
        if content is None:
            raise ValueError("the row holds no bytes")
        return bytes(content)


_SPLITS = ("train", "val", "test")


@functools.lru_cache(maxsize=16)
def _open(root: str, file: str) -> pq.ParquetFile:
    """Raises ValueError where the file is damaged or is not in the layout."""
    folder = Storage(root)
    try:
        parquet = pq.ParquetFile(folder.filesystem.open_input_file(folder.file(file)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{folder}/{file} is no whole Parquet file: {error}") from None
    columns = set(parquet.schema_arrow.names)
    if "label" not in columns or not columns & {"image", "img"}:
        raise ValueError(f"{folder}/{file} has the columns {sorted(columns)}: it needs `image` or `img`, and `label`")
    return parquet


@functools.lru_cache(maxsize=64)
def _images(root: str, file: str, group: int) -> pa.ChunkedArray:
    parquet = _open(root, file)
    column = "image" if "image" in parquet.schema_arrow.names else "img"
    return parquet.read_row_group(group, columns=[column])[column]


def _class_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """Names of the labels in the metadata that the `datasets` library writes."""
    try:
        info: dict[str, Any] = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(info["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None
