"""Source text to prepared Parquet: a tokenizer, and sequences of its tokens, packed.

The documents of a shard follow each other, each with a token behind it that ends it, and are cut into sequences that
begin with a token of their own. So none is padded; the last one of a shard, which would not be full, is left out. Each
shard is one task and one file, as those of images are (`prepare.py`), and what holds for them holds here.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data import tokenizer as tokenizers
from prelora_ray.data.draws import Draw, generator
from prelora_ray.data.manifest import Counts, Manifest, Shard, Skipped, Split, write_manifest
from prelora_ray.data.prepare_settings import TRAINED_TOKENIZERS, PrepareSettings
from prelora_ray.data.shards import PARTS, PrepareError, check_is_ours, part_of, remove_stale, run_tasks, shuffled
from prelora_ray.data.sources.source import Item
from prelora_ray.data.sources.splits import Splits
from prelora_ray.data.sources.text import PIECE_BYTES, TextReader, TextSource, open_text
from prelora_ray.data.token_rows import Tokens, masked_tokens
from prelora_ray.errors import UserError
from prelora_ray.extras import check_installed
from prelora_ray.storage import Storage, absolute
from prelora_ray.words import counted

_VERSION = 1
"""Of what a shard is made of and how."""
_TOKEN_BYTES = 4
"""Of text, about."""
_TRAINED_ON = 2**30
"""Most bytes of text that a tokenizer is trained on: a share of a larger one, drawn."""


def prepare_text(
    source: str, out: str, settings: PrepareSettings, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Prepares `source` into folder `out` and returns its manifest. Needs a running Ray.

    `on_progress` is called with the pieces of text done and their total. Raises UserError for an invalid source or
    tokenizer; PrepareError where more than ``settings.max_bad`` of the documents cannot be read, or a split is left
    without a sequence.
    """
    check_installed("--task mlm", "text", "tokenizers")
    folder = Storage(out)
    opened = open_text_for(source, out, settings)
    items = split_items(opened, source, settings)
    (folder / PARTS).make()
    folder.remove_file("manifest.json")  # shards may change from here on
    tokenizer = _tokenizer(folder, opened.reader, items["train"], settings)
    tasks = _tasks(opened.reader, items, folder.uri, tokenizer, settings)
    written = run_tasks(tasks, on_progress)
    bad = [entry for made in written for entry in made.bad]
    folder.remove_file("bad.json")
    if bad:
        folder.write_json("bad.json", [{"document": name, "reason": reason} for name, reason in bad])
    total = sum(made.documents for made in written) + len(bad)
    if len(bad) > settings.max_bad * total:
        raise PrepareError(
            f"{len(bad)} of {counted(total, 'document')} in {source!r} cannot be read, more than --max-bad {settings.max_bad} "
            f"allows; they are listed with the reasons in {folder}/bad.json, the first is {bad[0][0]!r}: {bad[0][1]}"
        )
    splits: dict[Split, tuple[Shard, ...]] = {
        split: tuple(made.shard for task, made in zip(tasks, written, strict=True) if task.split == split) for split in items
    }
    for split, shards in splits.items():
        if not sum(sum(shard.row_groups) for shard in shards):
            of_split = [made for task, made in zip(tasks, written, strict=True) if task.split == split]
            tokens, unmaskable = sum(made.tokens for made in of_split), sum(made.unmaskable for made in of_split)
            what = "train on" if split == "train" else "validate with"
            raise PrepareError(
                f"{source!r} has too little text to {what}: {counted(tokens, 'token')}, and a sequence has "
                f"--sequence-length {settings.sequence_length}" + (f"; {_unmaskable(unmaskable)}" if unmaskable else "")
            )
    loaded = tokenizers.read_tokenizer(folder.file(tokenizers.FILE), f"{folder}/{tokenizers.FILE}")
    vocabulary = tokenizers.vocabulary_of(loaded)
    manifest = Manifest(
        classes=vocabulary,
        splits=splits,
        bad=len(bad),
        settings={"source": source, **settings.model_dump()},
        counts=_count(opened, tasks, written, settings, len(vocabulary)),
        text=tokenizers.text_format(loaded, settings.sequence_length),
    )
    remove_stale(folder, {tokenizers.FILE, *(task.file for task in tasks)})
    write_manifest(folder, manifest)
    return manifest


def open_text_for(source: str, out: str, settings: PrepareSettings) -> TextSource:
    """A source as it is prepared into folder `out`. Raises UserError where either will not do. Writes nothing."""
    folder = Storage(out)
    check_is_ours(folder, source)
    return open_text(source, Splits(settings.train_split, settings.val_split), settings.text_column, folder.path)


def split_items(source: TextSource, name: str, settings: PrepareSettings) -> dict[Split, list[Item]]:
    """The pieces of both splits in a seeded shuffle.

    Without any to validate with, some are held out, by (seed, name), so that another file changes nothing for those
    that are there. Raises UserError where that leaves a split empty.
    """
    train, val = source.items["train"], source.items.get("val", [])
    if not val:
        held = {item.name for item in train if _share_of(settings.seed, item.name) < settings.val_fraction}
        val = [item for item in train if item.name in held]
        train = [item for item in train if item.name not in held]
        if not train or not val:
            what = "validate with" if train else "train on"
            raise UserError(f"--val-fraction {settings.val_fraction} leaves no text of {name!r} to {what}")
    rng, of_shard = generator(settings.seed, Draw.PREPARE), _pieces_of_shard(settings)
    return {"train": shuffled(train, rng, of_shard), "val": shuffled(val, rng, of_shard)}


def _share_of(seed: int, name: str) -> float:
    """A number in 0..1 that is drawn for a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") / 2**64


def _pieces_of_shard(settings: PrepareSettings) -> int:
    return max(1, settings.shard_rows * settings.sequence_length * _TOKEN_BYTES // PIECE_BYTES)


def _tokenizer(folder: Storage, reader: TextReader, items: Sequence[Item], settings: PrepareSettings) -> bytes:
    """Trains the tokenizer, unless it is there already, made from the same text; or takes the one that is given.

    Returns its file, which is in the folder then.
    """
    if settings.tokenizer not in TRAINED_TOKENIZERS:
        where, name = posixpath.split(absolute(settings.tokenizer))
        if not Storage(where).exists(name):
            raise UserError(f"--tokenizer {settings.tokenizer} is not allowed: it must be wordpiece, bpe, or a tokenizer.json")
        given = tokenizers.read_tokenizer(settings.tokenizer, f"--tokenizer {settings.tokenizer}")
        made_of, make = hashlib.sha256(given.to_str().encode()).hexdigest(), lambda: given
    else:
        content = [_VERSION, repr(reader), repr(items), settings.tokenizer, settings.vocabulary]
        made_of = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        make = lambda: tokenizers.train_tokenizer(settings.tokenizer, lambda: _texts(reader, items), settings.vocabulary)  # noqa: E731
    note = part_of(tokenizers.FILE)
    try:
        file = folder.read_bytes(tokenizers.FILE)
        if (folder / PARTS).read_json(note) == {"fingerprint": made_of, "sha256": hashlib.sha256(file).hexdigest()}:
            return file
    except (OSError, ValueError):
        pass
    file = make().to_str(pretty=True).encode()
    folder.write_bytes(tokenizers.FILE, file)
    (folder / PARTS).write_json(note, {"fingerprint": made_of, "sha256": hashlib.sha256(file).hexdigest()})
    return file


def _texts(reader: TextReader, items: Sequence[Item]) -> Iterator[str]:
    num_bytes = 0
    for item in items:
        for document in reader.read(item):
            if document.text is not None:
                num_bytes += len(document.text.encode())
                yield document.text
        if num_bytes >= _TRAINED_ON:
            return


def _tasks(
    reader: TextReader, items: dict[Split, list[Item]], out: str, tokenizer: bytes, settings: PrepareSettings
) -> list[TextTask]:
    digest, size = hashlib.sha256(tokenizer).hexdigest(), _pieces_of_shard(settings)
    return [
        TextTask(reader, split, out, f"{split}-{i // size:05d}.parquet", tuple(of_split[i : i + size]), settings, digest)
        for split, of_split in items.items()
        for i in range(0, len(of_split), size)
    ]


def _count(
    opened: TextSource, tasks: Sequence[TextTask], written: Sequence[_Written], settings: PrepareSettings, vocabulary: int
) -> Counts:
    """What became of every document."""
    documents: dict[Split, int] = {"train": 0, "val": 0}
    for task, made in zip(tasks, written, strict=True):
        documents[task.split] += made.documents
    skipped = Counter(opened.skipped)
    skipped["unreadable", ""] += sum(len(made.bad) for made in written)
    skipped["empty", ""] += sum(made.empty for made in written)
    tokens, left = sum(made.tokens for made in written), sum(made.left_out for made in written)
    notes = [f"read as {opened.kind}", *opened.notes]
    if "val" not in opened.items:
        notes.append(f"{settings.val_fraction:g} of the text is held out, as nothing is there to validate with")
    how = f"{settings.tokenizer} of" if settings.tokenizer in TRAINED_TOKENIZERS else "given tokenizer of"
    notes.append(f"{how} {counted(vocabulary, 'token')}")
    notes.append(
        f"{counted(tokens, 'token')} in sequences of {settings.sequence_length}; {left:,} at the ends of shards are left out"
    )
    if unmaskable := sum(made.unmaskable for made in written):
        notes.append(_unmaskable(unmaskable))
    return Counts(
        seen=sum(documents.values()) + sum(skipped.values()),
        classes={split: (number,) for split, number in documents.items()},
        skipped=tuple(Skipped(reason, of_ending, count) for (reason, of_ending), count in sorted(skipped.items()) if count),
        in_both=0,
        notes=tuple(notes),
    )


def _unmaskable(count: int) -> str:
    return f"{counted(count, 'sequence')} left out, with too few tokens to mask: the others are special, as unknown words are"


def pack(documents: Sequence[Sequence[int]], sequence_length: int, begin: int, end: int) -> tuple[Tokens, int]:
    """Full sequences of tokens (n, sequence_length), int32, and how many tokens did not fill another one.

    Each begins with `begin`, and behind each document stands `end`.
    """
    stream = np.concatenate([np.array([*document, end], np.int32) for document in documents] or [np.zeros(0, np.int32)])
    rows = len(stream) // (sequence_length - 1)
    full = stream[: rows * (sequence_length - 1)].reshape(rows, sequence_length - 1)
    return np.concatenate([np.full((rows, 1), begin, np.int32), full], axis=1), len(stream) - full.size


@dataclass(frozen=True)
class _Written:
    """What a task has made of its items."""

    shard: Shard
    bad: tuple[tuple[str, str], ...]
    """Name and reason of every document that cannot be read."""
    documents: int
    """Stored ones."""
    empty: int
    """Documents without a token."""
    tokens: int
    """Of the documents, with those that end them."""
    left_out: int
    """Of these."""
    unmaskable: int
    """Sequences that are not stored, as too few of their tokens can be masked."""


@dataclass(frozen=True)
class TextTask:
    """All that one task needs to write one shard; the tokenizer is in the folder."""

    reader: TextReader
    split: Split
    out: str
    file: str
    items: tuple[Item, ...]
    settings: PrepareSettings
    tokenizer: str
    """SHA-256 of its file."""

    def run(self) -> _Written:
        """Writes the shard, unless it is there already, made from the same text by the same tokenizer."""
        folder = Storage(self.out)
        fingerprint = self._fingerprint()
        if (there := _read_part(folder, self.file, fingerprint)) is not None:
            return there
        tokenizer = tokenizers.read_tokenizer(folder.file(tokenizers.FILE), tokenizers.FILE)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a text that names [MASK] or [SEP] is text, where a model can spell it
        special = tokenizers.text_format(tokenizer, self.settings.sequence_length).special
        left = set(special) - {tokenizer.token_to_id(tokenizers.named_tokens(tokenizer).get("unk_token", ""))}
        documents = [document for item in self.items for document in self.reader.read(item)]
        bad = tuple((document.name, document.reason) for document in documents if document.text is None)
        texts = [document.text for document in documents if document.text is not None]
        encoded = [
            [token for token in each.ids if token not in left]
            for each in tokenizer.encode_batch(texts, add_special_tokens=False)
        ]
        filled = [ids for ids in encoded if ids]
        sequences, left_out = pack(filled, self.settings.sequence_length, *tokenizers.ends_of(tokenizer))
        maskable = (~np.isin(sequences, special)).sum(axis=1) >= masked_tokens(self.settings.sequence_length)
        content, groups = self._parquet(sequences[maskable])
        folder.write_bytes(self.file, content)
        shard = Shard(self.file, groups, len(content), hashlib.sha256(content).hexdigest())
        tokens = sum(map(len, filled)) + len(filled)
        unmaskable = int((~maskable).sum())
        written = _Written(shard, bad, len(filled), len(encoded) - len(filled), tokens, left_out, unmaskable)
        (folder / PARTS).write_json(part_of(self.file), {"fingerprint": fingerprint, **asdict(written)})
        return written

    def _parquet(self, sequences: Tokens) -> tuple[bytes, tuple[int, ...]]:
        """The file's bytes, and the rows of each row group."""
        length = self.settings.sequence_length
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(sequences.ravel(), pa.int32()), length)
        size = int(np.clip(self.settings.row_group_bytes // (_TOKEN_BYTES * length), 16, 512))
        sink = io.BytesIO()
        pq.write_table(pa.table({"tokens": tokens}), sink, row_group_size=size, compression="zstd", use_dictionary=False)
        return sink.getvalue(), tuple(min(size, len(sequences) - i) for i in range(0, len(sequences), size))

    def _fingerprint(self) -> str:
        """Changes with anything that the shard is made from."""
        settings = self.settings
        content = [_VERSION, repr(self.reader), repr(self.items), self.tokenizer]
        content += [settings.sequence_length, settings.row_group_bytes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_part(folder: Storage, file: str, fingerprint: str) -> _Written | None:
    """What a task of this fingerprint has written; None where its shard is not there, or not whole."""
    try:
        content = (folder / PARTS).read_json(part_of(file))
        if content.pop("fingerprint") != fingerprint or content["bad"]:  # what could not be read may be readable now
            return None
        shard = Shard(**{**content["shard"], "row_groups": tuple(content["shard"]["row_groups"])})
        written = _Written(**{**content, "shard": shard, "bad": ()})
        return written if folder.num_bytes(file) == shard.num_bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
