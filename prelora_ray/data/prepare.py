"""Source images to prepared Parquet, as a Ray Data job over all CPUs.

The rows of each split are shuffled by the seed, so that class-sorted sources do not make class-sorted row groups, and
cut into shards. Each shard is one task and one file, written whole, with a note of what it was made from beside it. So
a job that was killed keeps its finished shards, one whose source has changed makes only the changed shards anew, and
the same images and settings give the same bytes. The manifest comes last.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prelora_ray.data.draws import Draw, generator
from prelora_ray.data.encode import BadImageError, encode, is_other_file
from prelora_ray.data.manifest import Counts, Manifest, Shard, Skipped, Split, write_manifest
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.prepare_text import prepare_text
from prelora_ray.data.shards import PARTS, PrepareError, check_is_ours, part_of, remove_stale, run_tasks, shuffled
from prelora_ray.data.sources import Columns, Item, Reader, Source, Splits, open_source
from prelora_ray.data.sources.source import ending
from prelora_ray.errors import UserError, one_line
from prelora_ray.storage import Storage
from prelora_ray.words import counted

_DIGEST_BYTES = 8
_SHARD_VERSION = 2
"""Of what a shard is made of and how."""
_EXAMPLES = 3


def prepare(
    source: str,
    out: str,
    settings: PrepareSettings | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    task: str = "classification",
) -> Manifest:
    """Prepares `source` into folder `out` and returns its manifest. Needs a running Ray.

    `on_progress` is called with the images done and their total. `task` is a recipe's: `mlm` prepares text, as
    `prepare_text` does.

    Raises UserError for an invalid source; PrepareError where more than ``settings.max_bad`` of the images cannot be
    read, more than ``settings.max_overlap`` of the validation images are among the training images too, or a class is
    left without a training image.
    """
    settings = settings or PrepareSettings()
    for key in settings.of_other_tasks(task):
        value, what = getattr(settings, key), "text" if task == "mlm" else "images"
        raise UserError(f"--{key.replace('_', '-')} {value} is not allowed with --task {task}, which prepares {what}")
    if task == "mlm":
        return prepare_text(source, out, settings, on_progress)
    folder = Storage(out)
    opened = open_for(source, out, settings)
    tasks = plan(opened, folder.uri, settings)
    (folder / PARTS).make()
    folder.remove_file("manifest.json")  # shards may change from here on
    written = run_tasks(tasks, on_progress)
    copies = frozenset(val.name for val, _ in _in_both(tasks, written)) if "val" not in opened.items else frozenset()
    if copies:  # what is held out must not be trained on: copies of training images train too
        tasks = plan(opened, folder.uri, settings, copies)
        written = run_tasks(tasks, on_progress)
    bad = [(task.items[i].name, reason) for task, made in zip(tasks, written, strict=True) for i, reason in made.bad]
    folder.remove_file("bad.json")
    if bad:
        folder.write_json("bad.json", [{"image": name, "reason": reason} for name, reason in bad])
    total = sum(len(task.items) - len(made.other) for task, made in zip(tasks, written, strict=True))
    if len(bad) > settings.max_bad * total:
        raise PrepareError(
            f"{len(bad)} of {counted(total, 'image')} in {source!r} cannot be read, more than --max-bad {settings.max_bad} "
            f"allows; they are listed with the reasons in {folder}/bad.json, the first is {bad[0][0]!r}: {bad[0][1]}"
        )
    manifest = Manifest(
        classes=opened.classes,
        splits={
            split: tuple(made.shard for task, made in zip(tasks, written, strict=True) if task.split == split)
            for split in dict.fromkeys(task.split for task in tasks)
        },
        bad=len(bad),
        settings={"source": source, **settings.of_images()},
        counts=_count(source, opened, tasks, written, settings, len(copies)),
    )
    remove_stale(folder, {task.file for task in tasks})
    write_manifest(folder, manifest)
    return manifest


def open_for(source: str, out: str, settings: PrepareSettings) -> Source:
    """A source as it is prepared into folder `out`. Raises UserError where either will not do. Writes nothing."""
    folder = Storage(out)
    check_is_ours(folder, source)
    splits = Splits(settings.train_split, settings.val_split)
    return open_source(source, splits, Columns(settings.image_column, settings.label_column), folder.path)


def plan(source: Source, out: str, settings: PrepareSettings, train_too: frozenset[str] = frozenset()) -> list[ShardTask]:
    """The tasks that prepare a source, one a shard. Each carries its own images' places and the source's reader alone.

    `train_too`: names of images that are not to be held out. Raises UserError where no images are left to train on or
    to validate with.
    """
    tasks = []
    for split, items in _split(source, settings, train_too).items():
        for i in range(0, len(items), settings.shard_rows):
            name = f"{split}-{i // settings.shard_rows:05d}.parquet"
            tasks.append(ShardTask(source.reader, split, out, name, tuple(items[i : i + settings.shard_rows]), settings))
    return tasks


def _split(source: Source, settings: PrepareSettings, train_too: frozenset[str]) -> dict[Split, list[Item]]:
    """Items of both splits in a seeded shuffle; without validation images, some of each class are held out."""
    rng = generator(settings.seed, Draw.PREPARE)
    train, val = list(source.items["train"]), list(source.items.get("val", ()))
    if not val:
        by_class: dict[int, list[Item]] = {}
        for item in train:
            by_class.setdefault(item.label, []).append(item)
        train = []
        for label in sorted(by_class):
            members = [by_class[label][i] for i in rng.permutation(len(by_class[label]))]
            held_out = min(round(settings.val_fraction * len(members)), len(members) - 1)
            val += [item for item in members[:held_out] if item.name not in train_too]
            train += [item for item in members[:held_out] if item.name in train_too] + members[held_out:]
        if not train or not val:
            raise UserError(
                f"--val-fraction {settings.val_fraction} leaves no images to {'validate with' if train else 'train on'}"
            )
    return {"train": shuffled(train, rng, settings.shard_rows), "val": shuffled(val, rng, settings.shard_rows)}


def _count(
    source: str, opened: Source, tasks: list[ShardTask], written: list[_Written], settings: PrepareSettings, copies: int
) -> Counts:
    """What became of every image; `copies` were not held out, as they are training images too.

    Raises PrepareError where a class or the validation is not what it should be.
    """
    stored: dict[Split, list[int]] = {split: [0] * len(opened.classes) for split in ("train", "val")}
    skipped = Counter(opened.skipped)
    for task, made in zip(tasks, written, strict=True):
        left_out = {i: "unreadable" for i, _ in made.bad} | dict.fromkeys(made.other, "no image")
        for i, item in enumerate(task.items):
            if i in left_out:
                skipped[left_out[i], ending(item.name)] += 1
            else:
                stored[task.split][item.label] += 1
    for name, count in zip(opened.classes, stored["train"], strict=True):
        if not count:
            raise PrepareError(f"{source!r} has no training image of class {name!r} that can be read")
    if not sum(stored["val"]):
        raise PrepareError(f"{source!r} has no validation image that can be read and is no copy of a training image")
    notes = [f"read as {opened.kind}", *opened.notes]
    if "val" not in opened.items:
        notes.append(f"{settings.val_fraction:g} of each class is held out, as no images are there to validate with")
    if copies:
        one = "image that would have been held out is a copy of a training image, and trains too"
        several = "images that would have been held out are copies of training images, and train too"
        notes.append(counted(copies, one, several))
    both = _in_both(tasks, written)
    if both:
        examples = _examples(both, lambda item: f"{item.name!r}")
        of = counted(sum(stored["val"]), "validation image is", "validation images are")
        notes.append(f"{len(both)} of {of} among the training images too: {examples}")
    if len(both) > settings.max_overlap * sum(stored["val"]):
        raise PrepareError(f"{source!r}: {notes[-1]}; --max-overlap {settings.max_overlap} allows fewer")
    relabeled = _relabeled(tasks, written)
    if relabeled:
        examples = _examples(relabeled, lambda item: f"{item.name!r} of {opened.classes[item.label]!r}")
        notes.append(f"{counted(len(relabeled), 'image is', 'images are')} there under another class too: {examples}")
    return Counts(
        seen=sum(map(sum, stored.values())) + sum(skipped.values()),
        classes={split: tuple(numbers) for split, numbers in stored.items()},
        skipped=tuple(Skipped(reason, of_ending, count) for (reason, of_ending), count in sorted(skipped.items())),
        in_both=len(both),
        notes=tuple(notes),
    )


def _in_both(tasks: list[ShardTask], written: list[_Written]) -> list[tuple[Item, Item]]:
    """Validation images that are training images too, byte for byte, each with one of these."""
    train, train_items = _stored(tasks, written, "train")
    val, val_items = _stored(tasks, written, "val")
    _, in_val, in_train = np.intersect1d(val, train, return_indices=True)
    train_of = dict(zip(val[in_val].tolist(), in_train.tolist(), strict=True))
    both = np.flatnonzero(np.isin(val, train))
    return [(val_items[i], train_items[train_of[int(val[i])]]) for i in both]


def _relabeled(tasks: list[ShardTask], written: list[_Written]) -> list[tuple[Item, Item]]:
    """Images of another class than the first image with the same bytes, each with that one."""
    digests, items = _stored(tasks, written, "train", "val")
    labels = np.array([item.label for item in items])
    _, first, number = np.unique(digests, return_index=True, return_inverse=True)
    first_of = first[number]
    return [(items[i], items[first_of[i]]) for i in np.flatnonzero(labels != labels[first_of])]


def _stored(tasks: list[ShardTask], written: list[_Written], *splits: Split) -> tuple[NDArray[np.uint64], list[Item]]:
    """Digests and items of all images that were stored."""
    made_of = [(task, made) for task, made in zip(tasks, written, strict=True) if task.split in splits]
    digests = np.concatenate([np.frombuffer(made.digests, f">u{_DIGEST_BYTES}") for _, made in made_of])
    return digests, [task.items[i] for task, made in made_of for i in made.stored(len(task.items))]


def _examples(pairs: list[tuple[Item, Item]], tell: Callable[[Item], str]) -> str:
    """The first few pairs of the same image, for a person."""
    told = [f"{tell(one)} is {tell(other)}" for one, other in pairs[:_EXAMPLES]]
    return ", ".join([*told, "..."] if len(pairs) > _EXAMPLES else told)


@dataclass(frozen=True)
class _Written:
    """What a task has made of its items."""

    shard: Shard
    bad: tuple[tuple[int, str], ...]
    """Index and reason of every image that cannot be read."""
    other: tuple[int, ...]
    """Indices of files that are no images."""
    digests: bytes
    """Of every stored image's bytes in the source."""

    def stored(self, num_items: int) -> list[int]:
        """Indices of the items in the shard, in its order."""
        left_out = {i for i, _ in self.bad} | set(self.other)
        return [i for i in range(num_items) if i not in left_out]


UNREADABLE = (BadImageError, OSError, ValueError, pa.ArrowException)
"""What reading or encoding an image raises where it is a bad one."""


def check_storage_answered(error: Exception) -> None:
    """Raises an error of `UNREADABLE` again where it is the storage's fault, which says nothing of the image."""
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        raise error


@dataclass(frozen=True)
class ShardTask:
    """All that one task needs to write one shard."""

    reader: Reader
    split: Split
    out: str
    file: str
    items: tuple[Item, ...]
    settings: PrepareSettings

    def run(self) -> _Written:
        """Writes the shard, unless it is there already, made from the same images with the same settings."""
        folder = Storage(self.out)
        fingerprint = self._fingerprint()
        if (there := _read_part(folder, self.file, fingerprint)) is not None:
            return there
        rows, bad, other, digests = [], [], [], []
        for i, item in enumerate(self.items):
            content = b""
            try:
                content = self.reader.read(item)
                encoded = encode(content, self.settings.size, self.settings.quality, self.settings.max_pixels)
            except UNREADABLE as error:
                check_storage_answered(error)
                if is_other_file(item.name, content):
                    other.append(i)
                else:
                    bad.append((i, one_line(error)))
                continue
            digests.append(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest())
            rows.append((encoded, item.label, item.name))
        content, groups = self._parquet(rows)
        folder.write_bytes(self.file, content)
        shard = Shard(self.file, groups, len(content), hashlib.sha256(content).hexdigest())
        written = _Written(shard, tuple(bad), tuple(other), b"".join(digests))
        part = {"fingerprint": fingerprint, **asdict(written), "digests": written.digests.hex()}
        (folder / PARTS).write_json(part_of(self.file), part)
        return written

    def _parquet(self, rows: list[tuple[bytes, int, str]]) -> tuple[bytes, tuple[int, ...]]:
        """The file's bytes, and the rows of each row group."""
        images, labels, names = zip(*rows, strict=True) if rows else ((), (), ())
        schema = pa.schema([("image", pa.binary()), ("label", pa.int64()), ("source", pa.string())])
        table = pa.table([list(images), list(labels), list(names)], schema=schema)
        mean_bytes = max(1, sum(map(len, images)) // max(1, len(images)))
        size = int(np.clip(self.settings.row_group_bytes // mean_bytes, 16, 512))
        sink = io.BytesIO()
        # Encoded images do not compress further, and a plain page is read without a copy.
        pq.write_table(table, sink, row_group_size=size, compression="none", use_dictionary=False)
        return sink.getvalue(), tuple(min(size, len(rows) - i) for i in range(0, len(rows), size))

    def _fingerprint(self) -> str:
        """Changes with anything that the shard is made from."""
        content = [_SHARD_VERSION, repr(self.reader), repr(self.items), repr(self.settings.of_images())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_part(folder: Storage, file: str, fingerprint: str) -> _Written | None:
    """What a task of this fingerprint has written; None where its shard is not there, or not whole."""
    try:
        content = (folder / PARTS).read_json(part_of(file))
        shard = Shard(**{**content["shard"], "row_groups": tuple(content["shard"]["row_groups"])})
        bad = tuple((int(i), str(reason)) for i, reason in content["bad"])
        written = _Written(shard, bad, tuple(content["other"]), bytes.fromhex(content["digests"]))
        is_same = content["fingerprint"] == fingerprint and not bad  # what could not be read may be readable now
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return written if is_same and folder.num_bytes(file) == shard.num_bytes else None
