"""Tables of file and label: a CSV beside images, tiny-imagenet's `val_annotations.txt`, Kaggle's lists."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.source import Label
from prelora_ray.storage import Storage

IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "file", "path", "image_path", "image_name", "image_id", "id")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_name", "category", "target", "cls", "wnid", "breed")
ENDINGS = (".csv", ".tsv")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold images and labels; None takes the first of the usual names that is there."""

    image: str | None = None
    label: str | None = None

    def choose(self, names: Iterable[str], where: str) -> tuple[str, str]:
        """The column of images and that of labels. Raises ValueError where there is none, naming the file `where`."""
        there = list(names)
        return _choose("image", self.image, IMAGE_COLUMNS, there, where), _choose(
            "label", self.label, LABEL_COLUMNS, there, where
        )


def _choose(what: str, given: str | None, usual: Sequence[str], there: Sequence[str], where: str) -> str:
    for name in usual if given is None else (given,):
        if name in there:
            return name
    needed = f"`{given}`" if given is not None else f"one such as `{usual[0]}` or `{usual[1]}`"
    raise ValueError(f"{where} has the columns {there}: it needs {needed}; name another with --{what}-column")


def read_table(folder: Storage, file: str, columns: Columns) -> dict[str, Label]:
    """{file: label} of a table with a heading, or of lines `file <tab> label` without one.

    Raises ValueError where the file is no such table.
    """
    try:
        text = folder.read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder}/{file} is no text in UTF-8: {error}") from None
    if not file.lower().endswith(ENDINGS):
        rows = [line.split("\t") for line in text.splitlines() if line]
        if not all(len(row) > 1 for row in rows):
            raise ValueError(f"{folder}/{file} has a line that is not a file, a tab and a label")
        return _with_numbers({row[0]: row[1] for row in rows})
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if file.lower().endswith(".tsv") else ",")
    image, label = columns.choose(reader.fieldnames or (), f"{folder}/{file}")
    found: dict[str, str] = {}
    for row in reader:
        if not row[image] or not row[label]:
            raise ValueError(f"{folder}/{file} has a line without a file or a label: line {reader.line_num}")
        if found.setdefault(row[image], row[label]) != row[label]:
            raise ValueError(f"{folder}/{file} gives {row[image]!r} two labels, {found[row[image]]!r} and {row[label]!r}")
    return _with_numbers(found)


def _with_numbers(labels: dict[str, str]) -> dict[str, Label]:
    """Labels as numbers where all of them are."""
    if all(label.isdecimal() for label in labels.values()):
        return {file: int(label) for file, label in labels.items()}
    return dict(labels)


def match_files(table: dict[str, Label], directory: str, files: Iterable[File]) -> tuple[dict[str, Label], list[str]]:
    """{path: label} of the files that a table in `directory` names, and the names that fit no file.

    A table may give a path from its own folder, a file's name alone, or a name without its ending.
    """
    by_name: dict[str, list[str]] = {}
    for file in files:
        below = posixpath.relpath(file.path, directory or ".")
        base = posixpath.basename(file.path)
        for name in dict.fromkeys((below, base, posixpath.splitext(below)[0], posixpath.splitext(base)[0])):
            by_name.setdefault(name, []).append(file.path)
    labels: dict[str, Label] = {}
    missing = []
    for name, label in table.items():
        paths = by_name.get(posixpath.normpath(name), [])
        if len(paths) == 1:
            labels[paths[0]] = label
        else:
            missing.append(name)
    return labels, missing
