"""Names of classes that a source knows by number."""

from __future__ import annotations

from prelora_ray.data.manifest import is_prepared
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage

_FILES = ("classnames.txt", "classes.txt")


def class_names(folder: Storage) -> list[str] | None:
    """Names in the labels' order: the lines of `classnames.txt`, or those of a prepared folder; None without either."""
    for name in _FILES:
        if folder.exists(name):
            try:
                return folder.read_bytes(name).decode("utf-8-sig").rstrip().splitlines()
            except UnicodeDecodeError:
                raise UserError(f"{folder}/{name} is no text in UTF-8") from None
    return list(folder.read_json("manifest.json")["classes"]) if is_prepared(folder) else None
