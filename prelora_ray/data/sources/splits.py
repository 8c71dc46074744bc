"""Which split a path names, as Hugging Face reads file names.

https://huggingface.co/docs/hub/datasets-file-names-and-splits: a split's word stands anywhere in a file's or folder's
name, delimited by what is no letter.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

from prelora_ray.errors import UserError

SourceSplit = Literal["train", "val", "test"]
"""A split as a source has it: `test` validates where there is no `val`."""
WORDS: dict[SourceSplit, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}


@dataclass(frozen=True)
class Splits:
    """How paths are assigned to splits: by the splits' words, or by patterns that a user gives in their place."""

    train: str | None = None
    """Pattern (`*`, `?`, `[...]`) of the files or folders that train."""
    val: str | None = None
    """The same of those that validate."""

    def of(self, path: str) -> SourceSplit | None:
        """The split that a path, relative to the source, names; None where it names none.

        Raises UserError for a name that holds the words of two splits, or matches both patterns.
        """
        given: list[tuple[SourceSplit, str]] = [("train", self.train or ""), ("val", self.val or "")]
        found = {split for split, pattern in given if pattern and _matches(path, pattern)}
        for part in reversed(path.split("/")):
            if found:
                break
            words = re.split(r"[\W\d_]+", part.lower())
            found = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF and not self._is_given(_SPLIT_OF[word])}
        if len(found) > 1:
            raise UserError(f"{path!r} names {' and '.join(sorted(found))}: rename it, or give --train-split and --val-split")
        return next(iter(found), None)

    def check(self, there: Container[SourceSplit | None], source: str) -> None:
        """Raises UserError where a pattern is given, and its split is not among those that are there."""
        for option, pattern, split in (("--train-split", self.train, "train"), ("--val-split", self.val, "val")):
            if pattern is not None and split not in there:
                raise UserError(f"{option} {pattern!r} is not allowed: no image of {source} fits it")

    def _is_given(self, split: SourceSplit) -> bool:
        """Whether a pattern stands in place of a split's words; with `val` given, nothing else validates."""
        return self.train is not None if split == "train" else self.val is not None


def used_splits(there: Iterable[SourceSplit | None]) -> set[SourceSplit | None]:
    """Which of the splits that are there train and validate: what is in none trains where nothing says `train`."""
    there = set(there)
    used: set[SourceSplit | None] = {"train" if "train" in there else None, "val" if "val" in there else "test"}
    return used & there


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern is of the path, of a part of it, or of a folder that it lies in."""
    parts = path.split("/")
    starts = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(name, pattern.rstrip("/")) for name in (*parts, *starts))
