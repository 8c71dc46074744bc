"""Parquet files in the Hugging Face layout."""

from __future__ import annotations

import functools
import json
import posixpath
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.encode import is_image_name
from prelora_ray.data.sources.class_names import class_names
from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.source import Found, Item, Label, Source
from prelora_ray.data.sources.splits import Splits
from prelora_ray.data.sources.table import Columns
from prelora_ray.storage import Storage

ENDING = ".parquet"


def open_parquet(root: str, files: list[File], splits: Splits, columns: Columns) -> Source:
    """Files with a column of images (a struct of `bytes` and `path`, bytes, or paths) and a column of labels.

    Labels are numbers, names or truth values; numbers are named by the files' own metadata, or by `classnames.txt` in the
    folder, a line a class. Raises ValueError where a file is damaged or lacks a column.
    """
    found = Found("Parquet files", root)
    names: list[str] | None = None
    block = 0
    names_files = False
    for file in files:
        if not file.path.lower().endswith(ENDING):
            continue
        split = splits.of(file.path)
        parquet = _open(root, file.path, file.stamp)
        image, label = columns.choose(parquet.schema_arrow.names, f"{root}/{file.path}")
        _check_images(parquet.schema_arrow.field(image), f"{root}/{file.path}")
        names = names or _class_names(parquet.schema_arrow, label)
        for group in range(parquet.num_row_groups):
            for row, value in enumerate(parquet.read_row_group(group, columns=[label])[label].to_pylist()):
                at = (file.path, group, row, image)
                found.add(split, f"{file.path}/{group}/{row}", _checked(value, f"{root}/{file.path}"), at, block, file.stamp)
            block += 1
        names_files = names_files or not _holds_bytes(parquet.schema_arrow.field(image))
    for file in files:
        if not file.path.lower().endswith(ENDING) and not (names_files and is_image_name(file.path)):
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
            return self._read_path(posixpath.dirname(str(file)), path)
        if content is None:
            raise ValueError("the row holds no bytes")
        return bytes(content)

    def _read_path(self, directory: str, path: str) -> bytes:
        """A file that a row names, relative to the Parquet file or to the source."""
        for name in (posixpath.normpath(posixpath.join(directory, path)), posixpath.normpath(path)):
            if posixpath.isabs(name) or name.startswith(".."):
                raise ValueError(f"the row's path {path!r} leads out of the source")
            if Storage(self.root).exists(name):
                return Storage(self.root).read_bytes(name)
        raise ValueError(f"the row's path {path!r} names no file of the source")


def _holds_bytes(column: pa.Field) -> bool:
    return column.type not in (pa.string(), pa.large_string())


def _checked(label: Any, where: str) -> Label:
    if not isinstance(label, (int, str)):
        raise ValueError(f"{where} has the label {label!r}: a label is a whole number, a name or a truth value")
    return label


def _check_images(column: pa.Field, where: str) -> None:
    kind = column.type
    is_struct = pa.types.is_struct(kind) and bool({field.name for field in kind} & {"bytes", "path"})
    if not is_struct and kind not in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string()):
        raise ValueError(
            f"{where} holds {kind} in `{column.name}`: an image is bytes, a path, or a struct of `bytes` and `path`; name "
            "another column with --image-column"
        )


@functools.lru_cache(maxsize=16)
def _open(root: str, file: str, stamp: str) -> pq.ParquetFile:
    """Raises ValueError where the file is damaged. One with another `stamp` is another file."""
    folder = Storage(root)
    try:
        return pq.ParquetFile(folder.filesystem.open_input_file(folder.file(file)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{folder}/{file} is no whole Parquet file: {error}") from None


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
