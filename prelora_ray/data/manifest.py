"""What a prepared folder is: Parquet files of encoded images, or of tokens, and a manifest written last.

    OUT/manifest.json
    OUT/train-00000.parquet ...   columns: image (encoded bytes), label (int64), source (where it came from)
    OUT/val-00000.parquet ...
    OUT/parts/train-00000.json ...   what each Parquet file was made from, for a job that goes on
    OUT/bad.json                     unreadable images, where there are any

Text has one column, tokens (a sequence of int32 of fixed length), and beside it

    OUT/tokenizer.json               the tokenizer, as the library `tokenizers` writes it

A folder without a manifest is unfinished, and nothing trains on it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prelora_ray.errors import UserError
from prelora_ray.storage import Storage
from prelora_ray.words import counted

SCHEMA_VERSION = 3
_OF_IMAGES = 2
_READABLE = (1, 2, 3)
"""1 has no counts; 3 is of text."""
Split = Literal["train", "val"]


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    file: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """What is in the source and not among the stored images."""

    reason: str
    ending: str
    """Of the file's name, in small letters; empty where it has none."""
    count: int


@dataclass(frozen=True)
class Counts:
    """What became of a source. `seen` is the sum of all that was stored and skipped."""

    seen: int
    """Files, members or rows of the source."""
    classes: dict[Split, tuple[int, ...]]
    """Stored images of each class; of text, of one class, documents or parts of them."""
    skipped: tuple[Skipped, ...]
    in_both: int
    """Validation images that are among the training images too, by their bytes."""
    notes: tuple[str, ...]
    """What a user must be told of how the source was read."""


@dataclass(frozen=True)
class TextFormat:
    """What sequences of tokens are."""

    sequence_length: int
    special: tuple[int, ...]
    """Tokens that begin a sequence and end a document, and others that no text has: they are never masked."""
    mask: int
    """The token that stands in for a masked one."""


@dataclass(frozen=True)
class Manifest:
    classes: tuple[str, ...]
    """Class names; a label is an index into them. Of text, the tokenizer's vocabulary, which is what is told apart."""
    splits: dict[Split, tuple[Shard, ...]]
    bad: int
    """Source images that were skipped."""
    settings: dict[str, Any]
    """What the folder was prepared with."""
    counts: Counts | None = None
    """None in a folder of an older version."""
    text: TextFormat | None = None
    """None of images."""

    @property
    def task(self) -> str:
        """What it is for: a recipe's `task`."""
        return "classification" if self.text is None else "mlm"

    def row_groups(self, split: Split) -> tuple[int, ...]:
        """Rows of each row group of a split, in file order."""
        return tuple(rows for shard in self.splits[split] for rows in shard.row_groups)

    def num_images(self, split: Split) -> int:
        return sum(self.row_groups(split))

    @property
    def fingerprint(self) -> str:
        """Changes with any image, label or row group."""
        content = [self.classes, {split: [vars(shard) for shard in shards] for split, shards in self.splits.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Storage, manifest: Manifest) -> None:
    content, schema = asdict(manifest), SCHEMA_VERSION
    if manifest.text is None:
        del content["text"]
        schema = _OF_IMAGES
    else:
        content["task"] = manifest.task
    folder.write_json("manifest.json", {"schema": schema, **content})


def is_prepared(folder: Storage) -> bool:
    """Whether a folder is what `prepare` writes."""
    try:
        content = folder.read_json("manifest.json")
        return isinstance(content, dict) and {"schema", "splits", "classes"} <= content.keys()
    except (OSError, ValueError):
        return False


def read_manifest(folder: Storage) -> Manifest:
    """Reads the manifest and compares the shards' sizes with it.

    Raises UserError where the folder is not a whole prepared one of this schema version.
    """
    manifest = parse_manifest(folder)
    sizes = folder.list_files()
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        if sizes.get(shard.file) != shard.num_bytes:
            found = counted(sizes[shard.file], "byte") if shard.file in sizes else "missing"
            raise UserError(
                f"{folder}/{shard.file} is {found}, its manifest says {counted(shard.num_bytes, 'byte')}: prepare it again"
            )
    return manifest


def parse_manifest(folder: Storage) -> Manifest:
    """Reads the manifest alone, without the shards. Raises UserError where there is none of a known schema version."""
    if not folder.exists("manifest.json"):
        raise UserError(f"{folder} is no prepared folder (it has no manifest.json): run `prelora prepare SOURCE {folder}`")
    try:
        content = json.loads(folder.read_bytes("manifest.json"))
        schema = content.pop("schema")
        if schema in _READABLE:
            return _manifest(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder}/manifest.json is damaged: prepare the folder again") from None
    raise UserError(f"{folder} has schema version {schema}, this version reads up to {SCHEMA_VERSION}: prepare it again")


def _manifest(content: dict[str, Any]) -> Manifest:
    content["splits"] = {split: content["splits"][split] for split in ("train", "val")}
    splits = {
        split: tuple(Shard(**{**shard, "row_groups": tuple(shard["row_groups"])}) for shard in shards)
        for split, shards in content["splits"].items()
    }
    counts, text = content.pop("counts", None), content.pop("text", None)
    content.pop("task", None)  # which follows
    return Manifest(
        **{**content, "classes": tuple(content["classes"]), "splits": splits},
        counts=counts and _read_counts(counts),
        text=text and TextFormat(**{**text, "special": tuple(text["special"])}),
    )


def _read_counts(content: dict[str, Any]) -> Counts:
    return Counts(
        content["seen"],
        {split: tuple(numbers) for split, numbers in content["classes"].items()},
        tuple(Skipped(**entry) for entry in content["skipped"]),
        content["in_both"],
        tuple(content["notes"]),
    )
