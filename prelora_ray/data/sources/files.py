"""The files of a source: on a disk, where names are bytes, or in a bucket."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.fs

from prelora_ray.data.manifest import is_prepared
from prelora_ray.storage import Storage


def printable(name: str) -> str:
    """A file's name with `\\xe9` for every byte that is no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class File:
    """A file below a source's folder."""

    path: str
    """Relative to the folder; bytes that are no UTF-8 are surrogates, as `os.fsdecode` makes them."""
    stamp: str
    """Changes with the file: its size and time of change. Empty for what cannot be read: a pipe, a broken link."""
    at: tuple[str | int, ...] = ()
    """(tar, offset, size) of a member of a tar, whose `path` is the one inside."""
    block: int | None = None
    """Number of the tar, where it is unpacked as a whole."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        return printable(f"{self.at[0]}/{self.path}" if self.at else self.path)

    @property
    def parts(self) -> list[str]:
        return self.path.split("/")


def files_below(folder: Storage, leave_out: str | None = None) -> list[File]:
    """All files below a folder, sorted by path.

    Hidden files and folders are ignored, and so are prepared folders and the one at path `leave_out`, into which
    `prepare` writes.
    """
    if folder.is_local:
        found = list(_local_files(folder.path, "", leave_out, ()))
    else:
        selector = pyarrow.fs.FileSelector(folder.path, recursive=True)
        infos = folder.filesystem.get_file_info(selector)
        files = [info for info in infos if info.type == pyarrow.fs.FileType.File]
        prepared = tuple(
            f"{path}/"
            for path in (info.path.removesuffix("/manifest.json") for info in files if info.base_name == "manifest.json")
            if path != folder.path.rstrip("/") and is_prepared(folder / path[len(folder.path) :].lstrip("/"))
        )
        files = [info for info in files if not info.path.startswith(prepared)]
        found = [File(info.path[len(folder.path) :].lstrip("/"), f"{info.size}-{info.mtime_ns}") for info in files]
        within = None if leave_out is None else os.path.relpath(leave_out, folder.path) + "/"
        found = [
            file
            for file in found
            if not any(part.startswith(".") for part in file.parts) and not (within and file.path.startswith(within))
        ]
    return sorted(found, key=lambda file: file.path)


def file_at(folder: Storage, name: str) -> File:
    """A file that must be there."""
    if folder.is_local:
        status = os.stat(folder.file(name))
        return File(name, f"{status.st_size}-{status.st_mtime_ns}")
    info = folder.filesystem.get_file_info(folder.file(name))
    return File(name, f"{info.size}-{info.mtime_ns}")


def _local_files(root: str, relative: str, leave_out: str | None, above: tuple[tuple[int, int], ...]) -> Iterator[File]:
    """`above`: the folders that contain this one, as a link may lead back to one of them."""
    here = os.path.join(root, relative)
    status = os.stat(here)
    identity = status.st_dev, status.st_ino
    if identity in above or (leave_out is not None and os.path.realpath(here) == os.path.realpath(leave_out)):
        return
    with os.scandir(here) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    if relative and any(entry.name == "manifest.json" for entry in visible) and is_prepared(Storage(here)):
        return
    for entry in visible:
        path = f"{relative}/{entry.name}" if relative else entry.name
        if entry.is_dir():
            yield from _local_files(root, path, leave_out, (*above, identity))
            continue
        try:
            status = entry.stat()
            yield File(path, f"{status.st_size}-{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else "")
        except OSError:
            yield File(path, "")


def is_folder(folder: Storage) -> bool:
    if folder.is_local:
        return os.path.isdir(folder.path)
    return bool(folder.filesystem.get_file_info(folder.path).type == pyarrow.fs.FileType.Directory)
