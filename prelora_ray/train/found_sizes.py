"""micro_batch.json: the micro-batches that a run found to fit on its GPUs, to save its next attempt the search."""

from __future__ import annotations

import contextlib
import operator

from prelora_ray.engine.micro_batch import FoundSizes
from prelora_ray.method.phases import Phase
from prelora_ray.run_folder import RunFolder

FILE = "micro_batch.json"


def write_found(folder: RunFolder, device: str, found: FoundSizes) -> None:
    """Notes what was found on a GPU of this name. Where there is no room for it, the next attempt searches again."""
    with contextlib.suppress(OSError):
        sizes = {f"{phase} at {image_size}": size for (phase, image_size), size in found.items()}
        folder.write_json(FILE, {"device": device, **sizes})


def read_found(folder: RunFolder, device: str) -> FoundSizes:
    """What an earlier attempt found on a GPU of this name; nothing where that cannot be told."""
    try:
        sizes = folder.read_json(FILE)
        if sizes.pop("device") != device:
            return {}
        found: FoundSizes = {}
        for place, size in sizes.items():
            phase, _, image_size = place.partition(" at ")
            found[Phase(phase), int(image_size)] = operator.index(size)
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return {}
