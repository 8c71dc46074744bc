"""Tables of file and label: a CSV beside images, tiny-imagenet's `val_annotations.txt`, Kaggle's lists."""

from __future__ import annotations

import csv
import io
import posixpath
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.source import Label, is_number
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage

IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "file", "path", "image_path", "image_name", "image_id", "id")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_name", "category", "target", "cls", "wnid", "breed")
_SPLIT_COLUMNS = ("split", "splits", "subset", "partition", "set", "usage")
ENDINGS = (".csv", ".tsv")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold images and labels; None takes the first of the usual names that is there."""

    image: str | None = None
    label: str | None = None

    def choose(self, names: Iterable[str], where: str, notes: list[str]) -> tuple[str, str]:
        """The column of images and that of labels. A column of splits is not read, which is added to `notes`.

        Raises UserError where one of the two is missing, naming the file `where`.
        """
        there = list(names)
        image = _choose("image", self.image, IMAGE_COLUMNS, there, where)
        label = _choose("label", self.label, LABEL_COLUMNS, there, where)
        for name in there:
            note = f"the column `{name}` is not read: splits are told by the names of files and folders alone"
            if name.lower() in _SPLIT_COLUMNS and name not in (image, label) and note not in notes:
                notes.append(note)
        return image, label


def _choose(what: str, given: str | None, usual: Sequence[str], there: Sequence[str], where: str) -> str:
    for name in usual if given is None else (given,):
        if name in there:
            return name
    needed = f"`{given}`" if given is not None else f"one such as `{usual[0]}` or `{usual[1]}`"
    raise UserError(f"{where} has the columns {there}: it needs {needed}; name another with --{what}-column")


def read_table(folder: Storage, file: str, columns: Columns, notes: list[str]) -> dict[str, Label]:
    """{file: label} of a table with a heading, or of lines `file <tab> label` without one.

    Adds what a user must be told of it to `notes`. Raises UserError where the file is no such table.
    """
    try:
        text = folder.read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder}/{file} is no text in UTF-8: {error}") from None
    if not file.lower().endswith(ENDINGS):
        pairs = [line.split("\t")[:2] for line in text.splitlines() if line.strip()]
        if not all(len(pair) == 2 for pair in pairs):
            raise UserError(f"{folder}/{file} has a line that is not a file, a tab and a label")
    else:
        pairs = _pairs(text, f"{folder}/{file}", "\t" if file.lower().endswith(".tsv") else ",", columns, notes)
    found: dict[str, str] = {}
    for name, label in ((name.strip(), label.strip()) for name, label in pairs):
        if not name or not label:
            raise UserError(f"{folder}/{file} has a line without a file or a label")
        if found.setdefault(name, label) != label:
            raise UserError(f"{folder}/{file} gives {name!r} two labels, {found[name]!r} and {label!r}")
    if not found:
        raise UserError(f"{folder}/{file} has no lines")
    if all(map(is_number, found.values())):
        return {name: int(label) for name, label in found.items()}
    return dict(found)


def _pairs(text: str, where: str, delimiter: str, columns: Columns, notes: list[str]) -> list[list[str]]:
    """[file, label] of each line of a table with a heading."""
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        image, label = columns.choose(reader.fieldnames or (), where, notes)
        return [[row[image] or "", row[label] or ""] for row in reader]
    except csv.Error as error:
        raise UserError(f"{where} is no whole table: {error}") from None


def match_files(table: dict[str, Label], name: str, files: Sequence[File]) -> tuple[dict[str, Label], list[str]]:
    """{path: label} of the files that the table at path `name` lists, and the names in it that fit no file, or several.

    A table may give a path from its own folder, with its ending or without, or a file's name with its ending or
    without: the first of these that fits. Raises UserError where it fits no file at all, or gives one two labels.
    """
    ways: list[dict[str, list[str]]] = [{}, {}, {}, {}]
    for file in files:
        below = posixpath.relpath(file.path, posixpath.dirname(name) or ".")
        names = (
            below,
            posixpath.splitext(below)[0],
            posixpath.basename(below),
            posixpath.splitext(posixpath.basename(below))[0],
        )
        for way, written in zip(ways, names, strict=True):
            way.setdefault(unicodedata.normalize("NFC", written), []).append(file.path)
    labels: dict[str, Label] = {}
    missing = []
    for written, label in table.items():
        wanted = unicodedata.normalize("NFC", posixpath.normpath(written))
        paths = next((way[wanted] for way in ways if wanted in way), [])
        if len(paths) != 1:
            missing.append(written)
        elif labels.setdefault(paths[0], label) != label:
            raise UserError(f"{name!r} gives {paths[0]!r} two labels, {labels[paths[0]]!r} and {label!r}")
    if not labels:
        raise UserError(f"{name!r} names {missing[0]!r}, and no such file is there, nor any other of its files")
    return labels, missing
