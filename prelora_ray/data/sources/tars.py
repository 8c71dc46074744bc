"""Tars whose members are read by their place in the file. A compressed one is unpacked first, into a temporary file."""

from __future__ import annotations

import errno
import functools
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import pyarrow as pa

from prelora_ray.data.sources.files import File
from prelora_ray.errors import UserError, WorkError
from prelora_ray.storage import Storage

PLAIN, COMPRESSED = (".tar",), (".tar.gz", ".tgz")
ENDINGS = PLAIN + COMPRESSED
_PIECE = 2**24
_LEAST_FREE = 2**30
"""Bytes that unpacking leaves to whatever else needs the disk, such as Ray; on a small disk a twentieth of it."""
_MARK_BYTES = 512


class UnpackError(WorkError):
    """A compressed tar has no room on this machine."""


def tar_files(files: list[File]) -> list[File]:
    return [file for file in files if file.path.lower().endswith(ENDINGS)]


def members(folder: Storage, tar: File, offset: int = 0, size: int | None = None, block: int | None = None) -> Iterator[File]:
    """Files in a tar, which itself may lie inside another one, at `offset`.

    `block` is the tar's number, for readers of compressed ones. Raises UserError where the tar is cut off or is none.
    """
    stream, end = _open(folder.uri, tar.path, tar.stamp)
    end = end if size is None else offset + size
    stream.seek(offset)
    try:
        with tarfile.open(fileobj=cast(Any, _Part(stream, offset, end)), mode="r:", errors="surrogateescape") as archive:
            places: dict[str, tuple[int, int]] = {}
            for info in archive:
                if not (info.isfile() or info.islnk() or info.issym()):
                    continue
                if offset + info.offset_data + info.size > end:
                    raise UserError(f"{folder}/{tar.path} is cut off in the middle of {info.name!r}")
                name = posixpath.normpath(info.name).lstrip("/")
                if info.isfile():
                    places[name] = offset + info.offset_data, info.size
                else:  # a link to an earlier member
                    beside = posixpath.dirname(name) if info.issym() else ""
                    place = places.get(posixpath.normpath(posixpath.join(beside, info.linkname)))
                    places |= {name: place} if place else {}
                if not any(part.startswith(".") for part in name.split("/")):
                    yield File(name, tar.stamp if name in places else "", (tar.path, *places.get(name, (0, 0))), block)
            _check_end(stream, offset + archive.offset, end, f"{folder}/{tar.path}")
    except tarfile.TarError as error:
        raise UserError(f"{folder}/{tar.path} is no whole tar: {error}") from None


def _check_end(stream: Any, at: int, end: int, where: str) -> None:
    """Raises UserError where a tar has no end mark at `at`, or goes on behind it: tarfile silently reads no further."""
    stream.seek(at)
    if bytes(stream.read(min(_MARK_BYTES, end - at))) != bytes(_MARK_BYTES):
        raise UserError(f"{where} is cut off or damaged at byte {at:,}")
    while (left := end - stream.tell()) > 0:
        if any(stream.read(min(left, 2**20))):
            raise UserError(f"{where} goes on behind its end at byte {at:,}: it is several tars in one file")


def members_of_all(folder: Storage, tars: list[File]) -> Iterator[File]:
    """Files in several tars, one after the other."""
    for number, tar in enumerate(tars):
        yield from members(folder, tar, block=number if tar.path.lower().endswith(COMPRESSED) else None)


def read_member(root: str, tar: str, offset: int, size: int, stamp: str) -> bytes:
    """Bytes of a member. `stamp` is the tar's: one that was written anew is opened anew."""
    stream, _ = _open(root, tar, stamp)
    stream.seek(offset)
    return bytes(stream.read(size))


@functools.lru_cache(maxsize=16)
def _open(root: str, file: str, stamp: str) -> tuple[Any, int]:
    """The plain tar as a stream that can seek, and its size."""
    folder = Storage(root)
    if not file.lower().endswith(COMPRESSED):
        stream = folder.open_file(file)
        return stream, stream.size()
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the cache holds it
    try:
        with pa.CompressedInputStream(folder.open_file(file), "gzip") as source:
            while piece := source.read(_PIECE):
                _write(plain, piece, f"{folder}/{file}")
    except (OSError, pa.ArrowException, zlib.error) as error:
        raise UserError(f"{folder}/{file} is no whole gzip file: {error}") from None
    return plain, plain.tell()


def _write(plain: IO[bytes], piece: bytes, name: str) -> None:
    """Raises UnpackError where this would fill up the disk."""
    directory = tempfile.gettempdir()
    try:
        disk = shutil.disk_usage(directory)
        if disk.free - len(piece) < min(_LEAST_FREE, disk.total // 20):
            raise OSError(errno.ENOSPC, f"only {disk.free / 2**30:.1f} GiB are free there")
        plain.write(piece)
    except OSError as error:
        raise UnpackError(
            f"{name} cannot be unpacked into {directory}: {error.strerror}; give it unpacked, or set TMPDIR to a folder on a "
            "larger disk"
        ) from None


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
