"""Parquet files in the Hugging Face layout."""

from __future__ import annotations

import functools
import json
import posixpath
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.sources.class_names import class_names
from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.source import Found, Item, Label, Source
from prelora_ray.data.sources.splits import Splits, used_splits
from prelora_ray.data.sources.table import Columns
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage

ENDING = ".parquet"


def open_parquet(root: str, files: list[File], splits: Splits, columns: Columns) -> Source:
    """Files with a column of images (a struct of `bytes` and `path`, bytes, or paths) and a column of labels.

    Labels are numbers, names or truth values; numbers are named by the files' own metadata, or by `classnames.txt` in
    the folder, a line a class. Raises UserError where a file is damaged or lacks a column.
    """
    found = Found("Parquet files", root, splits)
    names: list[str] | None = None
    block = 0
    named: set[str] = set()
    stamps = {file.path: file.stamp for file in files}
    shards = [(splits.of(file.path), file) for file in files if file.path.lower().endswith(ENDING)]
    used = used_splits(split for split, _ in shards)
    for split, file in shards:
        if split not in used:
            for _ in range(_open(root, file.path, file.stamp).metadata.num_rows):
                found.skip_unused(split, "")
            continue
        parquet = _open(root, file.path, file.stamp)
        image, label = columns.choose(parquet.schema_arrow.names, f"{root}/{file.path}", found.notes)
        _check_images(parquet.schema_arrow.field(image), f"{root}/{file.path}")
        own_names = _class_names(parquet.schema_arrow, label)
        if names not in (None, own_names):
            raise UserError(f"{root}/{file.path} names other classes than the Parquet files before it")
        names = own_names
        for group in range(parquet.num_row_groups):
            labels = _column(root, file, group, label)
            names_of = _column(root, file, group, image) if _holds_paths(parquet, image) else [None] * len(labels)
            for row, (value, path) in enumerate(zip(labels, names_of, strict=True)):
                at = (file.path, group, row, image)
                name = next((name for name in _names(file.path, path) if name in stamps), "")
                named.add(name)
                stamp = file.stamp + stamps.get(name, "")
                found.add(split, f"{file.name}/{group}/{row}", _checked(value, f"{root}/{file.path}"), at, block, stamp)
            block += 1
    for file in files:
        if not file.path.lower().endswith(ENDING) and file.path not in named:
            found.skip("no Parquet file", file.path)
    return found.source(ParquetReader(root), names or class_names(Storage(root)))


@dataclass(frozen=True)
class ParquetReader:
    root: str

    def read(self, item: Item) -> bytes:
        file, group, row, column = item.at
        content: Any = _images(self.root, str(file), int(group), str(column), item.stamp)[int(row)].as_py()
        path = None
        if isinstance(content, dict):
            content, path = content.get("bytes"), content.get("path")
        if isinstance(content, str):
            content, path = None, content
        if content is None and path:
            return self._read_path(str(file), path)
        if content is None:
            raise ValueError("the row holds no bytes")
        return bytes(content)

    def _read_path(self, file: str, path: str) -> bytes:
        for name in _names(file, path):
            if posixpath.isabs(name) or name.startswith(".."):
                raise ValueError(f"the row's path {path!r} leads out of the source")
            if Storage(self.root).exists(name):
                return Storage(self.root).read_bytes(name)
        raise ValueError(f"the row's path {path!r} names no file of the source")


def _holds_paths(parquet: pq.ParquetFile, column: str) -> bool:
    return parquet.schema_arrow.field(column).type in (pa.string(), pa.large_string())


def _names(file: str, path: Any) -> list[str]:
    """What a path in a Parquet file may name: a file beside it, or one from the source's folder on."""
    if not isinstance(path, str):
        return []
    return [posixpath.normpath(posixpath.join(posixpath.dirname(file), path)), posixpath.normpath(path)]


def _column(root: str, file: File, group: int, column: str) -> list[Any]:
    """A column's values in a row group. Raises UserError where its pages are damaged."""
    try:
        values: list[Any] = _open(root, file.path, file.stamp).read_row_group(group, columns=[column])[column].to_pylist()
        return values
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{root}/{file.path} is damaged in column `{column}`: {error}") from None


def _checked(label: Any, where: str) -> Label:
    if not isinstance(label, (int, str)):
        raise UserError(f"{where} has the label {label!r}: a label is a whole number, a name or a truth value")
    return label


def _check_images(column: pa.Field, where: str) -> None:
    kind = column.type
    is_struct = pa.types.is_struct(kind) and bool({field.name for field in kind} & {"bytes", "path"})
    if not is_struct and kind not in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string()):
        raise UserError(
            f"{where} holds {kind} in `{column.name}`: an image is bytes, a path, or a struct of `bytes` and `path`; name "
            "another column with --image-column"
        )


@functools.lru_cache(maxsize=16)
def _open(root: str, file: str, stamp: str) -> pq.ParquetFile:
    """Raises UserError where the file is damaged. One with another `stamp` is another file."""
    folder = Storage(root)
    try:
        return pq.ParquetFile(folder.open_file(file))
    except pa.ArrowInvalid as error:
        raise UserError(f"{folder}/{file} is no whole Parquet file: {error}") from None


@functools.lru_cache(maxsize=64)
def _images(root: str, file: str, group: int, column: str, stamp: str) -> pa.ChunkedArray:
    return _open(root, file, stamp).read_row_group(group, columns=[column])[column]


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Names of the labels in the metadata that the `datasets` library writes."""
    try:
        info: dict[str, Any] = json.loads((schema.metadata or {})[b"huggingface"])
        return list(info["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
