"""How an attempt ended: a record of its own, as a full disk may have no room for the last line of a log."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import patiently

FILE = "end.json"
EndKind = Literal["finished", "stop", "preemption", "failed"]


@dataclass(frozen=True)
class End:
    """Written last by rank 0, for the driver to act on; or by the driver itself, where the workers failed for good."""

    end: EndKind
    """In this order: all epochs are trained, recorded and saved; the run was asked to stop; nodes are about to go;
    another try would not help."""
    epoch: int | None = None
    step: int | None = None
    """Where rank 0 stood."""
    message: str | None = None
    """Why it failed."""


def write_end(folder: RunFolder, end: End) -> None:
    folder.write_json(FILE, asdict(end))


def read_end(folder: RunFolder) -> End | None:
    """None where the attempt wrote none, or it is damaged."""
    if not folder.exists(FILE):
        return None
    try:
        return End(**patiently(lambda: folder.read_json(FILE)))
    except (ValueError, TypeError):
        return None


def remove_end(folder: RunFolder) -> None:
    """To be called before an attempt, so that an earlier one's record is not taken for its own."""
    folder.remove_file(FILE)
