"""Source images to prepared Parquet, as a Ray Data job over all CPUs.

The rows of each split are put into a seeded shuffle, so that class-sorted sources do not make
class-sorted row groups, and cut into shards. Each shard is one task and one file, written whole, which
carries the fingerprint of what it was made from; so a killed job started again keeps the shards that
stand, and the same source and settings give the same bytes. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from PIL import Image, ImageOps, UnidentifiedImageError

from prelora_ray.data.draws import Draw, generator
from prelora_ray.data.manifest import SCHEMA_VERSION, Manifest, Shard, Split, write_manifest
from prelora_ray.data.sources import Item, Source, open_source
from prelora_ray.data.stream import quiet_data_context
from prelora_ray.errors import WorkError
from prelora_ray.storage import Storage

_METADATA = b"prelora"
_LOSSLESS_SIDE = 64
_SHARDS_PER_BUFFER = 8


@dataclass(frozen=True)
class PrepareSettings:
    val_fraction: float = 0.2
    """Share of each class held out for validation, where the source has no validation images of its own."""
    size: int = 256
    """Longest that the shorter side of a stored image may be, in pixels; larger images are reduced."""
    max_bad: float = 0.001
    """Largest share of unreadable images before the job fails."""
    seed: int = 0
    """Seed of the held-out choice and of the rows' order."""
    quality: int = 92
    """JPEG quality of images that are encoded anew; images with a side of up to 64 pixels become PNG, which is lossless."""
    max_pixels: int = 100_000_000
    """Most pixels of a source image; a larger one is taken for a decompression bomb and counts as unreadable."""
    shard_rows: int = 2048
    """Images in a Parquet file."""
    row_group_bytes: int = 2**20
    """Encoded bytes in a row group, about: the unit that training reads."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction} is not allowed: it must lie between 0 and 1")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"--max-bad {self.max_bad} is not allowed: it must lie in 0 to 1")
        if self.size < 1:
            raise ValueError(f"--size {self.size} is not allowed: it is a number of pixels, at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} is not allowed: it must lie in 1 to 100")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} is not allowed: it is a whole number from 0 on")


class PrepareError(WorkError):
    """The source could be read, but too much of it is unusable."""


def prepare(
    source: str,
    out: str,
    settings: PrepareSettings | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Prepares `source` into folder `out` and returns its manifest. Needs a running Ray.

    `on_progress` is called with the images done and their total.

    Raises ValueError for a source that is none, PrepareError where more than ``settings.max_bad``
    of the images cannot be read.
    """
    settings = settings or PrepareSettings()
    opened = open_source(source)
    splits = _split(opened, settings)
    folder = Storage(out)
    folder.make()
    tasks: list[_ShardTask] = []
    for split, items in splits.items():
        for i in range(0, len(items), settings.shard_rows):
            name = f"{split}-{i // settings.shard_rows:05d}.parquet"
            tasks.append(_ShardTask(opened, split, out, name, tuple(items[i : i + settings.shard_rows]), settings))
    done, total = 0, sum(map(len, splits.values()))
    sizes = {task.file: len(task.items) for task in tasks}
    written: dict[str, _Written] = {}
    quiet_data_context()
    references = [ray.put(task) for task in tasks]  # by reference, as the tasks list every image of the source
    shards = ray.data.range(len(tasks), override_num_blocks=len(tasks))
    for row in shards.map(lambda row: {"written": ray.get(references[row["id"]]).run()}).iter_rows():
        result: _Written = row["written"]
        written[result.shard.file] = result
        done += sizes[result.shard.file]
        on_progress(done, total)
    bad = [entry for task in tasks for entry in written[task.file].bad]
    if bad:
        folder.write_json("bad.json", [{"image": name, "reason": reason} for name, reason in bad])
    if len(bad) > settings.max_bad * total:
        raise PrepareError(
            f"{len(bad)} of {total} images in {source!r} cannot be read, more than --max-bad {settings.max_bad} allows; "
            f"they are listed with the reasons in {folder}/bad.json, the first is {bad[0][0]!r}: {bad[0][1]}"
        )
    manifest = Manifest(
        classes=opened.classes,
        splits={split: tuple(written[t.file].shard for t in tasks if t.split == split) for split in splits},
        bad=len(bad),
        settings={"source": source, **asdict(settings)},
    )
    write_manifest(folder, manifest)
    return manifest


def _split(source: Source, settings: PrepareSettings) -> dict[Split, list[Item]]:
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
            held_out = round(settings.val_fraction * len(members))
            val += members[:held_out]
            train += members[held_out:]
        if not train or not val:
            raise ValueError(
                f"--val-fraction {settings.val_fraction} leaves no images to {'validate with' if train else 'train on'}"
            )
    return {"train": _shuffle(train, rng, settings), "val": _shuffle(val, rng, settings)}


def _shuffle(items: list[Item], rng: np.random.Generator, settings: PrepareSettings) -> list[Item]:
    """Items in random order. Those of a source that is read in blocks are shuffled inside a buffer of random blocks,
    so that a shard needs few of them: a block is read some `_SHARDS_PER_BUFFER` times and not once a shard."""
    blocks: dict[int, list[Item]] = {}
    for item in items:
        blocks.setdefault(-1 if item.block is None else item.block, []).append(item)
    shuffled: list[Item] = []
    buffer: list[Item] = []
    order = [list(blocks.values())[i] for i in rng.permutation(len(blocks))]
    for i, block in enumerate(order):
        buffer += block
        if i + 1 == len(order) or len(buffer) >= _SHARDS_PER_BUFFER * settings.shard_rows:
            shuffled += [buffer[j] for j in rng.permutation(len(buffer))]
            buffer = []
    return shuffled


@dataclass(frozen=True)
class _Written:
    shard: Shard
    bad: tuple[tuple[str, str], ...]
    """Name and reason of every image that was skipped."""

    @property
    def images(self) -> int:
        return sum(self.shard.row_groups)


@dataclass(frozen=True)
class _ShardTask:
    """All that one task needs to write one shard."""

    source: Source
    split: Split
    out: str
    file: str
    items: tuple[Item, ...]
    settings: PrepareSettings

    def run(self) -> _Written:
        folder = Storage(self.out)
        fingerprint = self._fingerprint()
        if folder.exists(self.file):
            content = folder.read_bytes(self.file)
            written = _describe(self.file, content, fingerprint)
            if written is not None:
                return written
        rows, bad = [], []
        for item in self.items:
            try:
                content = self.source.read(item)
                if _is_other_file(item.name, content):
                    continue
                encoded = encode(content, self.settings.size, self.settings.quality, self.settings.max_pixels)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                bad.append((item.name, str(error) or type(error).__name__))
                continue
            rows.append((encoded, item.label, item.name))
        content = self._parquet(rows, {"fingerprint": fingerprint, "bad": bad})
        folder.write_bytes(self.file, content)
        written = _describe(self.file, content, fingerprint)
        assert written is not None, "a shard that was just written describes itself"
        return written

    def _parquet(self, rows: list[tuple[bytes, int, str]], metadata: dict[str, Any]) -> bytes:
        images, labels, names = zip(*rows, strict=True) if rows else ((), (), ())
        schema = pa.schema(
            [("image", pa.binary()), ("label", pa.int64()), ("source", pa.string())],
            metadata={_METADATA: json.dumps(metadata)},
        )
        table = pa.table([list(images), list(labels), list(names)], schema=schema)
        mean_bytes = max(1, sum(map(len, images)) // max(1, len(images)))
        rows_per_group = int(np.clip(self.settings.row_group_bytes // mean_bytes, 16, 512))
        sink = io.BytesIO()
        # Encoded images do not compress further, and a plain page is read without a copy.
        pq.write_table(table, sink, row_group_size=rows_per_group, compression="none", use_dictionary=False)
        return sink.getvalue()

    def _fingerprint(self) -> str:
        """Changes with anything that changes the shard's bytes."""
        content = [SCHEMA_VERSION, repr(self.source.classes), repr(self.items), repr(asdict(self.settings))]
        root = getattr(self.source, "root", "")
        return hashlib.sha256(json.dumps([root, *content]).encode()).hexdigest()


def _describe(file: str, content: bytes, fingerprint: str) -> _Written | None:
    """What a shard's bytes hold; None where they are no whole shard of this fingerprint."""
    try:
        footer = pq.ParquetFile(io.BytesIO(content))
        metadata = json.loads((footer.schema_arrow.metadata or {})[_METADATA])
    except (pa.ArrowInvalid, KeyError):
        return None
    if metadata["fingerprint"] != fingerprint:
        return None
    groups = tuple(footer.metadata.row_group(i).num_rows for i in range(footer.num_row_groups))
    shard = Shard(file, groups, len(content), hashlib.sha256(content).hexdigest())
    return _Written(shard, tuple((name, reason) for name, reason in metadata["bad"]))


def _is_other_file(name: str, content: bytes) -> bool:
    """Whether a file among the images is none and does not claim to be one: a text, a thumbnail database."""
    try:
        Image.open(io.BytesIO(content)).close()
    except UnidentifiedImageError:
        ending = os.path.splitext(name)[1].lower()
        return bool(ending) and ending not in Image.registered_extensions()
    except Exception:  # an image, if a broken one: the caller will find out
        return False
    return False


def encode(content: bytes, size: int, quality: int, max_pixels: int) -> bytes:
    """An upright image in RGB with a shorter side of at most `size`, as PNG up to 64 pixels, else as JPEG.

    An RGB or grey JPEG or PNG that is so already is left untouched. Raises an error of Pillow's where
    the bytes are no whole image, ValueError where it has more than `max_pixels`.
    """
    if not content:
        raise ValueError("the file is empty")
    image: Image.Image = Image.open(io.BytesIO(content))
    if image.width * image.height > max_pixels:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {max_pixels:,}")
    image.load()
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    small = min(image.size) <= size
    if image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L") and upright and small:
        return content
    image = ImageOps.exif_transpose(_eight_bits(image)).convert("RGB")
    if min(image.size) > size:
        scale = size / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC, reducing_gap=3.0
        )
    buffer = io.BytesIO()
    if min(image.size) <= _LOSSLESS_SIDE:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


_ORIENTATION = 0x0112


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image by its upper bytes, where Pillow's conversion would clip all but the darkest to white."""
    if not image.mode.startswith("I"):
        return image
    grey = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    grey.info = image.info
    return grey
