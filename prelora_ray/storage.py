"""A folder on a local disk, a file share, S3 or GCS: the few operations that all of them have."""

from __future__ import annotations

import contextlib
import copy
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

import pyarrow as pa
import pyarrow.fs

from prelora_ray.errors import UserError, one_line

T = TypeVar("T")
_READ_WAITS = (0.1, 0.5, 2.0)
"""Seconds before each further try of a read."""
_READ_SECONDS = 5.0
"""After so many seconds a read is not tried again: a bucket's own client has then tried for 6 s or longer."""
_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{32}\.tmp")
_SYNCS_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Errors with which a file share says that it cannot sync a folder."""


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, tried again for some seconds after an OSError. A missing file is raised at once."""
    end = time.monotonic() + _READ_SECONDS
    for wait in _READ_WAITS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(wait)
    return read()


def once_reachable(reach: Callable[[], T], seconds: float, meanwhile: Callable[[], None] = lambda: None) -> T:
    """What `reach` returns, tried again after each OSError, which is raised once `seconds` have passed.

    Calls `meanwhile` before each further try.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return reach()
        except OSError:
            if time.monotonic() > end:
                raise
        meanwhile()
        time.sleep(_READ_WAITS[-1])


def absolute(path: str | os.PathLike[str]) -> str:
    """A local path (``~/x``, ``file:///x``, or relative to the current folder) as an absolute one, which is the same
    place for any process; the URI of a bucket as it is."""
    path = os.fspath(path).removeprefix("file://")
    if "://" in path:
        return path
    try:
        local = Path(path).expanduser().absolute()
    except RuntimeError:  # no such user
        raise UserError(f"{path!r} is no path: nobody here has such a home folder") from None
    return str(local.resolve() if ".." in local.parts else local)


_UPLOADED = re.compile(r"/_ray_pkg_[0-9a-f]+(/|$)")
"""In the path of what `ray job submit --working-dir` uploads."""


def check_outlives_job(path: str) -> None:
    """Raises UserError for an absolute path inside the folder that `ray job submit` has uploaded: Ray removes it."""
    if _UPLOADED.search(path):
        raise UserError(
            f"{path!r} is not allowed in a job: a relative path lies in what Ray uploaded for it, and removes; give a path "
            "from the root on that every node sees, or a bucket"
        )


def check_local(path: str) -> None:
    """Raises UserError where what is written on a disk alone is to go into a bucket."""
    if "://" in absolute(path):
        raise UserError(f"{path!r} is not allowed: it must be on a disk")


def check_out_folder(path: str) -> None:
    """Raises UserError where a folder cannot be, at a file or below one, or would not outlive a job."""
    place = nearest = absolute(path)
    check_outlives_job(place)
    if "://" in place:
        return
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        told = "it" if nearest == place else repr(nearest)
        raise UserError(f"{path!r} is not allowed: {told} is a file, where a folder must be")


def check_out_file(option: str, path: str | None) -> None:
    """Raises UserError where an option's file cannot be, or would not outlive a job; None is no file."""
    if path is None:
        return
    check_local(path)
    place = absolute(path)
    check_outlives_job(place)
    folder = os.path.dirname(place)
    if os.path.isdir(place):
        raise UserError(f"{option} {path} is not allowed: it is a folder; give a file")
    if not os.path.isdir(folder):
        raise UserError(f"{option} {path} is not allowed: {folder} is no folder")


_KEYS = re.compile(r"://[^\s'\"/@:]*:[^\s'\"]*@")
"""The name and the secret in ``s3://NAME:SECRET@bucket``; a secret may hold a slash or an @."""
NO_KEYS = (
    "an address without keys in it, as it is written into records: keys belong where the cloud's own tools look for them, "
    "such as AWS_ACCESS_KEY_ID"
)


def without_keys(text: str) -> str:
    """The text with dots in place of the keys of every address in it."""
    return _KEYS.sub("://...@", text)


def check_holds_no_keys(path: str) -> str:
    """The path or URI as it is. Raises UserError, without repeating the secret, where it holds keys."""
    if _KEYS.search(path):
        raise UserError(f"{without_keys(path)!r} is not allowed: it must be {NO_KEYS}")
    return path


class Storage:
    """One folder, named by a path or a URI (``s3://bucket/path``, ``gs://bucket/path``).

    Its name (`uri`, and as a string) is absolute, so that it can be handed to processes that run in other folders.
    Raises UserError for a URI that holds keys, or names an unknown kind of bucket.

    A file that is written whole appears whole: on a disk by renaming, on an object store because an
    upload does. Object stores can neither append nor rename, so `append` works on disks alone.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = absolute(check_holds_no_keys(os.fspath(uri)))
        if "://" in self.uri:
            try:
                self.filesystem, self.path = pyarrow.fs.FileSystem.from_uri(self.uri)
            except pa.ArrowInvalid as error:
                raise UserError(f"{self.uri!r} is no folder or bucket: {one_line(error)}") from None
        else:
            self.filesystem, self.path = pyarrow.fs.LocalFileSystem(), self.uri

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def __truediv__(self, name: str) -> Self:
        below = copy.copy(self)  # with the same client: each new one asks the bucket for its region
        below.uri, below.path = posixpath.join(self.uri, name), posixpath.join(self.path, name)
        return below

    def file(self, name: str) -> str:
        """Path of a file in the folder, as `filesystem` takes it."""
        return posixpath.join(self.path, name)

    def make(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def exists(self, name: str) -> bool:
        if self.is_local:
            return os.path.exists(self.file(name))
        return bool(self.filesystem.get_file_info(self.file(name)).type != pyarrow.fs.FileType.NotFound)

    def num_bytes(self, name: str) -> int | None:
        """Size of a file; None where there is none."""
        if self.is_local:
            return os.path.getsize(self.file(name)) if os.path.isfile(self.file(name)) else None
        info = self.filesystem.get_file_info(self.file(name))
        return info.size if info.type == pyarrow.fs.FileType.File else None

    def list_files(self) -> dict[str, int]:
        """Sizes in bytes of the files directly in the folder, by name; empty where there is no folder."""
        return {info.base_name: info.size for info in self._entries() if info.type == pyarrow.fs.FileType.File}

    def list_folders(self) -> list[str]:
        """Names of the folders directly in the folder, sorted."""
        return sorted(info.base_name for info in self._entries() if info.type == pyarrow.fs.FileType.Directory)

    def _entries(self) -> list[pyarrow.fs.FileInfo]:
        try:
            entries: list[pyarrow.fs.FileInfo] = self.filesystem.get_file_info(
                pyarrow.fs.FileSelector(self.path, allow_not_found=True)
            )
        except FileNotFoundError:  # pyarrow looks twice, and it was made in between
            return []
        return entries

    def open_file(self, name: str) -> pa.NativeFile:
        """A file to be read from any position. On a disk its name may be bytes that are no UTF-8, as in all reads."""
        if self.is_local:
            return pa.OSFile(os.fsencode(self.file(name)))
        return self.filesystem.open_input_file(self.file(name))

    def read_bytes(self, name: str) -> bytes:
        if self.is_local:
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
        """Removes what killed writers left of files directly in the folder, but for names that begin as in `but`."""
        for name in self.list_files():
            match = _TEMPORARY.fullmatch(name)
            if match and not match[1].startswith(tuple(but)):
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
    """Makes the names in a folder durable: without it, a loss of power may undo a renaming."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _SYNCS_NO_FOLDERS:
            raise
    finally:
        os.close(descriptor)
