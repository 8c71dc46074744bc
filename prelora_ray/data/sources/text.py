"""Text files, JSON lines and Parquet files of documents, any but the last also gzipped."""

from __future__ import annotations

import functools
import gzip
import io
import json
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.files import File, file_at, files_below, is_folder, printable
from prelora_ray.data.sources.source import Item, ending
from prelora_ray.data.sources.splits import SourceSplit, Splits, used_splits
from prelora_ray.errors import UserError, one_line
from prelora_ray.storage import Storage

Format = Literal["text", "lines", "parquet"]
_FORMATS: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "lines"),
    ".parquet": "parquet",
}
PIECE_BYTES = 2**14
"""Of text, about that are held out or shuffled together. A document that is longer is cut, unless it is a JSON line."""
_CUTS = (re.compile(rb"\n"), re.compile(rb"\s"), re.compile(rb".[\x80-\xbf]{0,3}", re.DOTALL))
"""What a cut is made behind: a line, where none ends soon a word, and where none does a character in UTF-8."""


@dataclass(frozen=True)
class Document:
    name: str
    """What a person calls it."""
    text: str | None
    """None where it cannot be read."""
    reason: str = ""
    """Why it cannot."""


@dataclass(frozen=True)
class TextSource:
    """The contents of a source of text. Its items are pieces, each of some documents or of a part of one."""

    kind: str
    reader: TextReader
    items: dict[Split, list[Item]]
    """With no "val", a share of "train" is held out."""
    skipped: Counter[tuple[str, str]]
    """Files that are not read, by (reason, ending)."""
    notes: tuple[str, ...]


def open_text(source: str, splits: Splits, column: str, leave_out: str | None = None) -> TextSource:
    """Opens `pydoc`, a folder, or a file of any name, which is plain text where its ending tells nothing else.

    Files below the folder `leave_out` are ignored. Raises UserError where there is no such source, it is damaged, or
    there is nothing to train on in it.
    """
    if source == "pydoc":
        splits.check((), "'pydoc'")
        reader = TextReader(source, column)
        items = [item for topic in sorted(_pydoc()) for item in _pieces(reader, topic, "", len(_pydoc()[topic]), None)]
        return TextSource("Python's reference", reader, {"train": items}, Counter(), ())
    folder = Storage(source)
    if is_folder(folder):
        root, files = folder.uri, files_below(folder, leave_out)
    else:
        root, name = posixpath.split(folder.uri)
        if Storage(root).num_bytes(name) is None:
            raise UserError(f"{source!r} is no source of text: give `pydoc`, a folder, or a text, JSON lines or Parquet file")
        files = [file_at(Storage(root), name)]
    return _open_files(source, TextReader(root, column), files, splits, any_name=not is_folder(folder))


def _open_files(source: str, reader: TextReader, files: list[File], splits: Splits, *, any_name: bool) -> TextSource:
    skipped: Counter[tuple[str, str]] = Counter()
    by_split: dict[SourceSplit | None, list[Item]] = {}
    chosen: list[tuple[SourceSplit | None, File]] = []
    for file in files:
        if file.stamp and (any_name or _format(file.path) is not None):
            chosen.append((splits.of(file.path), file))
        else:
            skipped["no text", ending(file.path)] += 1
    used = used_splits(split for split, _ in chosen)
    for block, (split, file) in enumerate(chosen):
        if split in used:
            by_split.setdefault(split, []).extend(reader.pieces(file, block))
        else:
            told = f"of split {split}, which is not used" if split else "in no split"
            skipped[told, ending(file.path)] += 1
    splits.check(by_split, f"{source!r}, read as text,")
    train = by_split.get("train" if "train" in used else None)
    if not train:
        raise UserError(
            f"{source!r} has no text to train on: no .txt, .md, .rst, .jsonl, .json or .parquet file with any in it"
        )
    val = by_split.get("val") or by_split.get("test")
    notes = ["the files whose names are of no split are taken for training"] if None in used and len(used) > 1 else []
    return TextSource("text", reader, {"train": train, "val": val} if val else {"train": train}, skipped, tuple(notes))


@dataclass(frozen=True)
class TextReader:
    """Reads documents, in whatever process it is."""

    root: str
    column: str
    """Of Parquet files, and the key of JSON lines."""

    def pieces(self, file: File, block: int) -> Iterator[Item]:
        """The pieces of a file; those of one that is read as a whole are of a block. Raises UserError where it is
        damaged."""
        where = f"{self.root}/{file.name}"
        try:
            if _format(file.path) == "parquet":
                yield from self._row_pieces(file, block)
            elif file.path.lower().endswith(".gz"):
                num_bytes = len(_unpacked(self.root, file.path, file.stamp))
                yield from _pieces(self, file.path, file.stamp, num_bytes, block)
            else:
                yield from _pieces(self, file.path, file.stamp, Storage(self.root).num_bytes(file.path) or 0, None)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise UserError(f"{where} cannot be read: {one_line(error)}") from None

    def read(self, item: Item) -> Iterator[Document]:
        """The documents of a piece. Raises OSError where the storage does not answer."""
        path, start, stop = str(item.at[0]), int(item.at[1]), int(item.at[2])
        if _format(path) == "parquet":
            column = _column(self.root, path, item.stamp, int(item.at[3]), self.column)
            for row, content in enumerate(column[start:stop], start):
                name = f"{printable(path)}/{item.at[3]}/{row}"
                yield Document(name, None, "it is null") if content is None else _decoded(name, content)
            return
        with self._open(path, item.stamp) as file:
            if _format(path) != "lines":
                yield _decoded(item.name, _part(file, start, stop))
                return
            lines = b"".join(_lines(file, start, stop))
        for number, line in enumerate(lines.splitlines()):
            if line.strip():
                yield self._json_document(f"{item.name}, line {number + 1}", line)

    def _json_document(self, name: str, line: bytes) -> Document:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Document(name, None, f"it is no JSON: {one_line(error)}")
        text = content.get(self.column) if isinstance(content, dict) else None
        if not isinstance(text, str):
            return Document(name, None, f"it has no text under the key {self.column!r}")
        try:
            text.encode()
        except UnicodeEncodeError:
            return Document(name, None, "it holds half a surrogate pair")
        return Document(name, text)

    def _open(self, path: str, stamp: str) -> IO[bytes]:
        if self.root == "pydoc":
            return io.BytesIO(_pydoc()[path])
        if path.lower().endswith(".gz"):
            return io.BytesIO(_unpacked(self.root, path, stamp))
        return io.BufferedReader(Storage(self.root).open_file(path))

    def _row_pieces(self, file: File, block: int) -> Iterator[Item]:
        with pq.ParquetFile(Storage(self.root).open_file(file.path)) as parquet:
            names, schema = parquet.schema_arrow.names, parquet.schema_arrow
            if self.column not in names:
                told = f"it needs `{self.column}`; name another with --text-column"
                raise UserError(f"{self.root}/{file.name} has the columns {names}: {told}")
            type_ = schema.field(self.column).type
            if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
                raise UserError(f"{self.root}/{file.name}: column {self.column!r} holds {type_}, and must hold strings")
            index = parquet.metadata.schema.names.index(self.column)
            for group in range(parquet.num_row_groups):
                about = parquet.metadata.row_group(group)
                mean = about.column(index).total_uncompressed_size / max(1, about.num_rows)
                rows = max(1, int(PIECE_BYTES / max(1.0, mean)))
                for start in range(0, about.num_rows, rows):
                    at = (file.path, start, min(start + rows, about.num_rows), group)
                    name = f"{file.name}/{group}/{start}"
                    yield Item(name, 0, at, _block_of(block, group), file.stamp)


def _block_of(file: int, group: int) -> int:
    """A number for each row group of each file."""
    return file * 2**20 + group


def _pieces(reader: TextReader, path: str, stamp: str, num_bytes: int, block: int | None) -> Iterator[Item]:
    last = max(0, num_bytes // PIECE_BYTES - 1)  # as long as a whole one, so that a cut leaves something of it
    for i in range(last + 1):
        start, stop = i * PIECE_BYTES, num_bytes if i == last else (i + 1) * PIECE_BYTES
        yield Item(f"{printable(path)} from byte {start:,}", 0, (path, start, stop), block, stamp)


def _lines(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in the bytes from `start` to `stop`; one that only passes through is not read to its end."""
    if start:
        file.seek(start - 1)
        if not file.readline(stop - start).endswith(b"\n"):
            return
    while file.tell() < stop and (line := file.readline()):
        yield line


def _part(file: IO[bytes], start: int, stop: int) -> bytes:
    """The bytes from the cut near `start` to the one near `stop`."""
    begin = max(0, start - 1)
    file.seek(begin)
    content = file.read(stop - 1 - begin + PIECE_BYTES)
    return content[_cut(content, start - begin) : _cut(content, stop - begin)]


def _cut(content: bytes, near: int) -> int:
    """The first place from `near` on, by fewer than PIECE_BYTES, at which a text is cut."""
    if near:
        for ends in _CUTS:
            if found := ends.search(content, near - 1, near - 1 + PIECE_BYTES):
                return found.end()
    return near


def _decoded(name: str, content: bytes) -> Document:
    try:
        return Document(name, content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Document(name, None, f"it is no text in UTF-8: {error.reason} at byte {error.start:,}")


def _format(path: str) -> Format | None:
    """By the file's ending; None where that is no text's."""
    name = path.lower().removesuffix(".gz")
    found = _FORMATS.get(posixpath.splitext(name)[1])
    return None if found == "parquet" and path.lower().endswith(".gz") else found


@functools.lru_cache(maxsize=2)
def _unpacked(root: str, path: str, stamp: str) -> bytes:
    """`stamp`: of the file, so that a changed one is read anew. Raises OSError or EOFError where it is damaged."""
    try:
        return gzip.decompress(Storage(root).read_bytes(path))
    except zlib.error as error:
        raise OSError(str(error)) from error


@functools.lru_cache(maxsize=2)
def _column(root: str, path: str, stamp: str, group: int, column: str) -> list[bytes | None]:
    with pq.ParquetFile(Storage(root).open_file(path)) as parquet:
        texts = parquet.read_row_group(group, columns=[column])[column]
        # As bytes, for Arrow does not look whether a string is UTF-8.
        found: list[bytes | None] = texts.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return found


@functools.cache
def _pydoc() -> dict[str, bytes]:
    """The reference that Python's own `help` shows, by topic."""
    from pydoc_data.topics import topics

    return {topic: text.encode() for topic, text in topics.items()}
