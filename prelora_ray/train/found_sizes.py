"""micro_batch.json: the micro-batches that a run found to fit on its GPUs, to save its next attempt the search."""

from __future__ import annotations

import contextlib
import operator

from prelora_ray.method.phases import Phase
from prelora_ray.run_folder import RunFolder

FILE = "micro_batch.json"


def write_found(folder: RunFolder, device: str, sizes: dict[Phase, int]) -> None:
    """Notes what was found on a GPU of this name. Where there is no room for it, the next attempt searches again."""
    with contextlib.suppress(OSError):
        folder.write_json(FILE, {"device": device, **{phase.value: size for phase, size in sizes.items()}})


def read_found(folder: RunFolder, device: str) -> dict[Phase, int]:
    """What an earlier attempt found on a GPU of this name; nothing where that cannot be told."""
    try:
        found = folder.read_json(FILE)
        if found.pop("device") != device:
            return {}
        return {Phase(phase): operator.index(size) for phase, size in found.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
