"""Prepared data that is not what `prepare` wrote. A retry would find it too, so the first attempt reports it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from prelora_ray.data.manifest import Shard
from prelora_ray.errors import WorkError
from prelora_ray.storage import Storage
from prelora_ray.words import counted

_MEND = "delete this file and prepare the folder again, which makes it anew"


class DamagedDataError(WorkError):
    """A shard is not what its manifest says, or a stored image cannot be decoded. Its text names shard and row."""


class UndecodableError(Exception):
    """A row of a shard cannot be decoded."""

    def __init__(self, sample: int, reason: str) -> None:
        super().__init__(reason)
        self.sample = sample


def check_shard(folder: Storage, shard: Shard, content: bytes) -> None:
    """Raises DamagedDataError where the content of a shard is not what its manifest says."""
    if len(content) != shard.num_bytes:
        found = f"it has {counted(len(content), 'byte')}, and its manifest says {shard.num_bytes:,}"
    elif (digest := hashlib.sha256(content).hexdigest()) != shard.sha256:
        found = f"its SHA-256 is {digest[:12]}..., and its manifest says {shard.sha256[:12]}..."
    else:
        return
    raise DamagedDataError(f"{folder}/{shard.file} is damaged: {found}; {_MEND}")


def damaged_image(folder: Storage, shards: Sequence[Shard], sample: int, reason: str) -> DamagedDataError:
    """The error that names a stored image, by its sample id: its shard, its row (from 0), and what it was made from."""
    for shard in shards:
        rows = sum(shard.row_groups)
        if sample < rows:
            break
        sample -= rows
    return damaged_row(folder, shard.file, sample, _source(folder, shard.file, sample), reason)


def damaged_row(folder: Storage, file: str, row: int, source: str | None, reason: str) -> DamagedDataError:
    made_from = "" if source is None else f" ({source})"
    return DamagedDataError(f"{folder}/{file}, row {row}{made_from}: the stored image cannot be decoded: {reason}; {_MEND}")


def _source(folder: Storage, file: str, row: int) -> str | None:
    """What a row was made from; None where its shard cannot be read for it."""
    try:
        with folder.filesystem.open_input_file(folder.file(file)) as stream:
            source: str = pq.read_table(stream, columns=["source"])["source"][row].as_py()
            return source
    except (OSError, pa.ArrowException, KeyError, IndexError):
        return None
