"""How an attempt ended: a record of its own, as the last line of a log may be the one that found no room."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import patiently

FILE = "end.json"
EndKind = Literal["finished", "stop", "preemption", "failed"]


@dataclass(frozen=True)
class End:
    """What rank 0 writes as its last act, and the driver goes by; or the driver itself, where the workers failed for good."""

    end: EndKind
    """All epochs are trained, recorded and saved; asked to stop; nodes are about to go; another try would not help."""
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
    """Before an attempt, that no earlier one's is taken for its own."""
    folder.remove_file(FILE)
