"""What every source of images is to `prepare`, and how one is put together from the files that are found."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prelora_ray.data.manifest import Split
from prelora_ray.data.sources.files import printable
from prelora_ray.data.sources.splits import SourceSplit, Splits, used_splits
from prelora_ray.errors import UserError
from prelora_ray.words import counted

Label = int | str | bool
"""A label as a source has it: a number, or a class's name."""
_Image = tuple[str, Label, tuple[str | int, ...], int | None, str]


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source."""

    name: str
    """What a person calls it: a path relative to the source, a member of a tar, a row."""
    label: int
    """Index of its class."""
    at: tuple[str | int, ...] = ()
    """Where the reader finds it."""
    block: int | None = None
    """Number of the unit that is read at once (a Parquet row group); None where any image is as cheap to read."""
    stamp: str = ""
    """Changes with the file that holds it."""


class Reader(Protocol):
    """Reads images, in whatever process it is. Every task carries one, so it holds no list of them."""

    def read(self, item: Item) -> bytes:
        """The image, encoded. Raises OSError or ValueError where it cannot be read."""


@dataclass(frozen=True)
class Source:
    """The contents of a source: every image that `prepare` is to read, and what it leaves out."""

    kind: str
    """How it was read, for a person: `image folders`, `WebDataset`."""
    reader: Reader
    classes: tuple[str, ...]
    """Class names; a label is an index into them. Each has a training image."""
    items: dict[Split, list[Item]]
    """With no "val", a share of "train" is held out."""
    skipped: Counter[tuple[str, str]]
    """Files, members or rows that are not read, by (reason, ending)."""
    notes: tuple[str, ...]
    """Sentences that a user must be told."""


@dataclass
class Found:
    """Collects what is found while a source is listed."""

    kind: str
    root: str
    splits: Splits = field(default_factory=Splits)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    _images: dict[SourceSplit | None, list[_Image]] = field(default_factory=dict)

    def add(
        self,
        split: SourceSplit | None,
        name: str,
        label: Label,
        at: tuple[str | int, ...] = (),
        block: int | None = None,
        stamp: str = "",
    ) -> None:
        """An image; None is no split."""
        self._images.setdefault(split, []).append((name, label, at, block, stamp))

    def has_images_of(self, *splits: SourceSplit | None) -> bool:
        return any(split in self._images for split in splits)

    def skip(self, reason: str, name: str) -> None:
        """Something that is left out."""
        self.skipped[reason, ending(name)] += 1

    def skip_unused(self, split: SourceSplit | None, name: str) -> None:
        """Something of a split that neither trains nor validates, or of none."""
        self.skip(f"of split {split}, which is not used" if split else "in no split", name)

    def source(self, reader: Reader, names: Sequence[str] | None = None) -> Source:
        """What was found, with labels as indices into the classes that occur.

        `names` are those of labels that are numbers. Raises UserError where there is nothing to train on, nothing to
        tell apart, or nothing that fits a pattern of a split.
        """
        self.splits.check(self._images, f"{self.root!r}, read as {self.kind},")
        chosen = self._splits()
        classes, index = self._classes(chosen, names)
        items = {
            split: [Item(name, index[_key(label)], at, block, stamp) for name, label, at, block, stamp in images]
            for split, images in chosen.items()
        }
        return Source(self.kind, reader, classes, items, self.skipped, tuple(self.notes))

    def _splits(self) -> dict[Split, list[_Image]]:
        """The images of each split. Those of no split train where no name says `train`."""
        used = used_splits(self._images)
        for split, images in self._images.items():
            for name, *_ in images if split not in used else ():
                self.skip_unused(split, name)
        train = self._images.get("train" if "train" in used else None)
        if not train:
            only = f", only to {' and '.join(sorted(map(str, used)))}" if used else ""
            raise UserError(f"{self.root!r} has no images to train on{only}")
        if None in used and len(self._images) > 1:
            self.notes.append("the files whose names are of no split are taken for training")
        val = self._images.get("val") or self._images.get("test")
        return {"train": train, "val": val} if val else {"train": train}

    def _classes(
        self, chosen: dict[Split, list[_Image]], names: Sequence[str] | None
    ) -> tuple[tuple[str, ...], dict[Label, int]]:
        """Class names, and the index of each label: classes are those of the training images, sorted."""
        label_of: dict[Split, dict[Label, Label]] = {
            split: {_key(label): label for _, label, *_ in images} for split, images in chosen.items()
        }
        found = label_of["train"]
        kinds = {type(label) for labels in label_of.values() for label in labels.values()}
        if len(kinds) > 1:
            raise UserError(f"{self.root!r} has labels of several kinds: {', '.join(sorted(k.__name__ for k in kinds))}")
        is_number = kinds == {int}
        if is_number and min(map(int, found)) < 0:
            raise UserError(f"{self.root!r} has label {min(map(int, found))}: labels are whole numbers from 0 on")
        if is_number and names is not None and max(map(int, found)) >= len(names):
            raise UserError(
                f"{self.root!r} has label {max(map(int, found))}, and names {counted(len(names), 'class', 'classes')}"
            )
        for name, label, *_ in chosen.get("val", ()):
            if _key(label) not in found:
                told = names[int(label)] if is_number and names is not None and 0 <= int(label) < len(names) else label
                raise UserError(f"{self.root!r} has {printable(name)!r} of class {told!r} in val, and no such class in train")
        if len(found) < 2:
            alone = next(iter(found.values()))
            alone = names[int(alone)] if is_number and names is not None else alone
            raise UserError(f"{self.root!r} has one class alone, {alone!r}: there is nothing to tell apart")
        order = sorted(found)
        self._note_gaps(order, is_number, names)
        named = [names[int(label)] if is_number and names is not None else printable(str(label)) for label in order]
        return tuple(named), {label: i for i, label in enumerate(order)}

    def _note_gaps(self, order: list[Label], is_number: bool, names: Sequence[str] | None) -> None:
        """Tells of numbers without images, as labels are then others than the source's."""
        if not is_number or int(order[-1]) == len(order) - 1 == len(names or order) - 1:
            return
        if names is not None:
            missing = [name for i, name in enumerate(names) if i not in set(map(int, order))]
            which = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            one = "named class has no training images and is left out"
            several = "named classes have no training images and are left out"
            self.notes.append(f"{counted(len(missing), one, several)}, of {len(names)}: {which}")
        else:
            self.notes.append(
                f"{counted(len(order), 'label occurs', 'labels occur')} between {order[0]} and {order[-1]}: they become 0 to "
                f"{len(order) - 1}, and keep their numbers as class names"
            )


def _key(label: Label) -> Label:
    """The same for all labels of a class: names are composed (NFC) in some file systems and decomposed in others."""
    return unicodedata.normalize("NFC", label) if isinstance(label, str) else label


def is_number(text: str) -> bool:
    """Whether a label that is written is a number: `7`, and not `07`, which another label may be beside it."""
    return text.removeprefix("-").isdecimal() and str(int(text)) == text


def ending(name: str) -> str:
    """The ending of a file's name, in small letters: `.jpg`; empty where there is none."""
    return posixpath.splitext(printable(name))[1].lower()
