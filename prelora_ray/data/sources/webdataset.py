"""WebDataset: tar shards, each sample a group of members with one key."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field

from prelora_ray.data.encode import IMAGE_ENDINGS, is_image_name
from prelora_ray.data.sources.class_names import class_names
from prelora_ray.data.sources.files import File
from prelora_ray.data.sources.folder import FileReader, add_file, has_class_folders, open_folders
from prelora_ray.data.sources.source import Found, Label, Source, is_number
from prelora_ray.data.sources.splits import SourceSplit, Splits, used_splits
from prelora_ray.data.sources.table import Columns
from prelora_ray.data.sources.tars import ENDINGS, members_of_all, read_member, tar_files
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage

_LABELS = (".cls", ".json")


def open_tars(root: str, beside: list[File], splits: Splits, columns: Columns) -> Source:
    """Shards of samples: an image, and its label in `.cls` or `.json`. Tars without labels are read as image folders.

    A key is a member's name up to its last dot, where a label has the same key; else up to its first one, as in
    `0001.left.jpg` and `0001.cls`. The label in a `.json` is its `label` or `cls`, a number or a name; numbers are
    named by `classnames.txt` in the folder, a line a class. `beside`: the tars, and what lies beside them.

    Raises UserError where shards are damaged or a label is none.
    """
    folder = Storage(root)
    tars = tar_files(beside)
    files = list(members_of_all(folder, tars))
    others = [file for file in beside if not file.path.lower().endswith(ENDINGS)]
    labels = {posixpath.splitext(file.path)[0] for file in files if file.path.lower().endswith(_LABELS)}
    has_labels = any(key in labels for file in files if is_image_name(file.path) for key in _keys(file.path))
    if not has_labels and has_class_folders(files, splits):
        return open_folders(root, files + others, splits, columns)
    found = Found("WebDataset", root, splits)
    for file in others:
        found.skip("no tar", file.path)
    samples: dict[tuple[str, str], _Sample] = {}
    for file in files:
        if file.path.lower().endswith(_LABELS):
            samples.setdefault((str(file.at[0]), posixpath.splitext(file.path)[0]), _Sample()).labels.append(file)
    for file in files:
        shard = str(file.at[0])
        ending = posixpath.splitext(file.path)[1].lower()
        if ending in IMAGE_ENDINGS:
            key = next((key for key in _keys(file.path) if (shard, key) in samples), posixpath.splitext(file.path)[0])
            samples.setdefault((shard, key), _Sample()).images.append(file)
        elif ending not in _LABELS:
            found.skip("neither image nor label", file.path)
    used = used_splits({_split(splits, shard, key) for shard, key in samples})
    for (shard, key), sample in samples.items():
        if (split := _split(splits, shard, key)) not in used:
            for file in sample.images:
                found.skip_unused(split, file.path)
            continue
        _add(found, folder, shard, key, sample, splits)
    return found.source(FileReader(root), class_names(folder))


@dataclass
class _Sample:
    images: list[File] = field(default_factory=list)
    labels: list[File] = field(default_factory=list)


def _keys(path: str) -> Iterable[str]:
    """Possible keys of a member, the longest first."""
    directory, name = posixpath.split(path)
    parts = name.split(".")
    return [posixpath.join(directory, ".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1)]


def _split(splits: Splits, shard: str, key: str) -> SourceSplit | None:
    """What a sample's folder in the shard says, or else the shard's path."""
    return splits.of(posixpath.dirname(key)) or splits.of(shard)


def _add(found: Found, folder: Storage, shard: str, key: str, sample: _Sample, splits: Splits) -> None:
    if not sample.images:
        for file in sample.labels:
            found.skip("a label without an image", file.path)
        return
    named = [file for file in sample.images if posixpath.splitext(file.path)[0] == key] or sample.images
    if len(named) > 1:
        raise UserError(f"{folder}/{shard} has two images of the sample {key!r}")
    for file in sample.images:
        if file is not named[0]:
            found.skip("a further image of its sample", file.path)
    label = _label(folder, sample.labels)
    if label is None:
        raise UserError(f"{folder}/{shard} has no label (.cls or .json) for the sample {key!r}")
    add_file(found, _split(splits, shard, key), named[0], label)


def _label(folder: Storage, files: list[File]) -> Label | None:
    """The label of a sample; None where its files hold none."""
    for file in sorted(files, key=lambda file: _LABELS.index(posixpath.splitext(file.path)[1].lower())):
        tar, offset, size = file.at
        content = read_member(folder.uri, str(tar), int(offset), int(size), file.stamp)
        try:
            text = content.decode("utf-8-sig").strip()
            if file.path.lower().endswith(".json"):
                described = json.loads(text)
                label = described["label"] if described.get("label") is not None else described["cls"]
            else:
                label = int(text) if is_number(text) else text
        except KeyError:
            continue
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{folder}/{tar} has no label that can be read in {file.path!r}") from None
        if not isinstance(label, (int, str)) or label == "":
            raise UserError(f"{folder}/{tar} has {label!r} in {file.path!r}: a label is a whole number or a class's name")
        return label
    return None
