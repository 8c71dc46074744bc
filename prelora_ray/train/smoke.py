"""A run of a minute or so through all that a recipe's own run goes through: does it start, switch, freeze and save?"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from prelora_ray.config import Settings
from prelora_ray.config_file import Override, load_settings

_CHANGES = (
    "data.max_batches=4",
    "train.epochs=4",
    "train.ramp_epochs=1",
    "train.resolution=[]",
    "train.bend=null",
    "train.validate_every=1",
    "method.enabled=true",
    "method.window_epochs=1",
    "method.switch_epoch=2",
    "method.warmup_epochs=1",
    "checkpoint.every_epochs=1",
    "workers.min=1",
)
"""Two epochs of phase full, as ranks need two windows, and one of each that follows."""


def smoke_run(path: str, overrides: Iterable[Override], *, name: str | None = None, storage: str | None = None) -> Settings:
    """A recipe's settings made a smoke run, under a name of its own each time. `overrides` win over what makes it one.

    Raises UserError as `load_settings` does.
    """
    name = name or f"{Path(path).stem}-fast-{time.strftime('%m%d-%H%M%S')}"
    return load_settings(path, [*_CHANGES, *overrides], name=name, storage=storage)
