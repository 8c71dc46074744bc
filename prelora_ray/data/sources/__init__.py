"""Where images come from: what `prelora prepare SOURCE` understands. docs/data.md describes each."""

from __future__ import annotations

import posixpath

from prelora_ray.data.sources.digits import open_digits
from prelora_ray.data.sources.files import file_at, files_below, is_folder
from prelora_ray.data.sources.folder import has_class_folders, open_folders, open_table, table_files
from prelora_ray.data.sources.idx import has_idx, open_idx
from prelora_ray.data.sources.imagenet import is_imagenet, open_imagenet
from prelora_ray.data.sources.parquet import ENDING, open_parquet
from prelora_ray.data.sources.source import Item, Reader, Source
from prelora_ray.data.sources.splits import Splits
from prelora_ray.data.sources.table import Columns
from prelora_ray.data.sources.tars import tar_files
from prelora_ray.data.sources.webdataset import open_tars
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage

__all__ = ["Columns", "Item", "Reader", "Source", "Splits", "open_source"]


def open_source(
    source: str, splits: Splits | None = None, columns: Columns | None = None, leave_out: str | None = None
) -> Source:
    """Opens a source: `digits`; a folder, recognised by its content; a tar, a Parquet file or a table of labels.

    Files below the folder `leave_out` (a path as its file system takes it) are ignored. Raises UserError where there is
    no such source, it is damaged, or there is nothing to train on in it.
    """
    splits, columns = splits or Splits(), columns or Columns()
    if source == "digits":
        splits.check((), "'digits'")
        return open_digits()
    folder = Storage(source)
    source = folder.uri
    if not is_folder(folder):
        return _open_file(source, splits, columns, leave_out)
    files = files_below(folder, leave_out)
    if is_imagenet(files):
        splits.check((), f"{source!r}, read as ImageNet,")
        return open_imagenet(source, files)
    if has_idx(files):
        splits.check((), f"{source!r}, read as IDX files,")
        return open_idx(source, files)
    if has_class_folders(files, splits):
        return open_folders(source, files, splits, columns)
    if any(file.path.lower().endswith(ENDING) for file in files):
        return open_parquet(source, files, splits, columns)
    if tar_files(files):
        return open_tars(source, files, splits, columns)
    if tables := table_files(files):
        return open_table(source, files, tables, splits, columns)
    return open_folders(source, files, splits, columns)


def _open_file(source: str, splits: Splits, columns: Columns, leave_out: str | None) -> Source:
    root, name = posixpath.split(source)
    folder = Storage(root)
    if folder.num_bytes(name) is None:
        raise UserError(
            f"{source!r} is no source: give `digits`, a folder of images, tars, Parquet or IDX files, or a table of labels"
        )
    file = file_at(folder, name)
    if name.lower().endswith(ENDING):
        return open_parquet(folder.uri, [file], splits, columns)
    if tar_files([file]):
        return open_tars(folder.uri, [file], splits, columns)
    if table_files([file]):
        return open_table(folder.uri, files_below(folder, leave_out), [name], splits, columns)
    raise UserError(f"{source!r} is no source: a file must be a tar, a Parquet file, or a table of labels (.csv, .tsv)")
