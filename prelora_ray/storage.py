"""A folder on a local disk, a file share, S3 or GCS: the few operations that all of them have."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow.fs

T = TypeVar("T")
_READ_WAITS = (0.1, 0.5, 2.0)
"""Seconds before each further try of a read."""
_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{32}\.tmp")
_SYNCS_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""How a file share says that it cannot."""


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns. An OSError may pass, and is raised where it stays for some seconds; a missing file at once."""
    for wait in _READ_WAITS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait)
    return read()


class Storage:
    """One folder, named by a path or a URI (``s3://bucket/path``, ``gs://bucket/path``).

    A file that is written whole appears whole: on a disk by renaming, on an object store because an
    upload does. Object stores can neither append nor rename, so `append` works on disks alone.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri)
        if "://" in self.uri and not self.uri.startswith("file://"):
            self.filesystem, self.path = pyarrow.fs.FileSystem.from_uri(self.uri)
        else:
            self.filesystem = pyarrow.fs.LocalFileSystem()
            self.path = str(Path(self.uri.removeprefix("file://")).expanduser().absolute())

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def __truediv__(self, name: str) -> Self:
        return type(self)(posixpath.join(self.uri, name))

    def file(self, name: str) -> str:
        """Path of a file in the folder, as `filesystem` takes it."""
        return posixpath.join(self.path, name)

    def make(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(self.file(name)).type != pyarrow.fs.FileType.NotFound)

    def num_bytes(self, name: str) -> int | None:
        """Size of a file; None where there is none."""
        info = self.filesystem.get_file_info(self.file(name))
        return info.size if info.type == pyarrow.fs.FileType.File else None

    def list_files(self) -> dict[str, int]:
        """Sizes in bytes of the files directly in the folder, by name; empty where there is no folder."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        return {
            info.base_name: info.size
            for info in self.filesystem.get_file_info(selector)
            if info.type == pyarrow.fs.FileType.File
        }

    def list_folders(self) -> list[str]:
        """Names of the folders directly in the folder, sorted."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.Directory)

    def read_bytes(self, name: str) -> bytes:
        if self.is_local:  # where a name may be bytes that are no UTF-8
            return Path(self.file(name)).read_bytes()
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file whole: a reader sees the old one or the new one."""
        path = self.file(name)
        if not self.is_local:
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(content)
            return
        _make_folder(os.path.dirname(path))
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"  # as _TEMPORARY has it
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(os.path.dirname(path))

    def remove_unfinished(self, but: Collection[str] = ()) -> None:
        """Removes what writers that were killed have left of files directly in the folder, but of those files."""
        for name in self.list_files():
            match = _TEMPORARY.fullmatch(name)
            if match and match[1] not in but:
                self.remove_file(name)

    def write_json(self, name: str, content: Any) -> None:
        self.write_bytes(name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def remove_file(self, name: str) -> None:
        """Removes a file, which may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.file(name))

    def rename_folder(self, name: str, new: str) -> None:
        """Gives a folder another name, in place of a folder that had it. In a bucket this is done file by file."""
        if self.exists(new):
            self.remove_folder(new)
        if self.is_local:
            os.rename(self.file(name), self.file(new))
            return
        selector = pyarrow.fs.FileSelector(self.file(name), recursive=True)
        files = [info.path for info in self.filesystem.get_file_info(selector) if info.type == pyarrow.fs.FileType.File]
        for path in files:
            self.filesystem.move(path, self.file(new) + path.removeprefix(self.file(name)))
        self.remove_folder(name)

    def remove_folder(self, name: str) -> None:
        self.filesystem.delete_dir(self.file(name))


def _make_folder(path: str) -> None:
    """Makes a folder on a disk, so that it is still there after a loss of power."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    _make_folder(above)
    os.makedirs(path, exist_ok=True)
    _sync_folder(above)


def _sync_folder(path: str) -> None:
    """Has a disk keep the names in a folder: that of a file which was renamed stays what it was until then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _SYNCS_NO_FOLDERS:
            raise
    finally:
        os.close(descriptor)
