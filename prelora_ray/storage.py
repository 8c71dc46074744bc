"""A folder on a local disk, a file share, S3 or GCS: the few operations that all of them have."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import uuid
from pathlib import Path
from typing import Any, Self

import pyarrow.fs


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
        return {info.base_name: info.size for info in self._entries() if info.type == pyarrow.fs.FileType.File}

    def list_folders(self) -> list[str]:
        """Names of the folders directly in the folder, sorted."""
        return sorted(info.base_name for info in self._entries() if info.type == pyarrow.fs.FileType.Directory)

    def _entries(self) -> list[pyarrow.fs.FileInfo]:
        try:
            entries: list[pyarrow.fs.FileInfo] = self.filesystem.get_file_info(
                pyarrow.fs.FileSelector(self.path, allow_not_found=True)
            )
        except FileNotFoundError:  # it was made while pyarrow looked a second time whether it is there
            return []
        return entries

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
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def write_json(self, name: str, content: Any) -> None:
        self.write_bytes(name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def remove_file(self, name: str) -> None:
        """Removes a file, which may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.file(name))

    def remove_folder(self, name: str) -> None:
        self.filesystem.delete_dir(self.file(name))
