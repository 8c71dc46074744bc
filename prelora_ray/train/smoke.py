"""A run of a minute or so through all that a recipe's own run goes through: does it start, switch, freeze and save?"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from prelora_ray.config import Settings, TrainSettings
from prelora_ray.config_file import Override, find_recipe, load_settings, parse_section, read_named
from prelora_ray.words import counted

logger = logging.getLogger(__name__)

_CHANGES = (
    "data.max_batches=4",
    "train.epochs=4",
    "train.ramp_epochs=1",
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
_MOST_DECAY = 0.75
"""Of the 4 epochs, which leaves the ramp's."""
_STEPS = 3
"""Of `train.resolution`, of an epoch each, that leave one of the 4 epochs for the full size."""


def smoke_run(path: str, overrides: Iterable[Override], *, name: str | None = None, storage: str | None = None) -> Settings:
    """A recipe's settings made a smoke run, under a name of its own each time. `overrides` win over what makes it one.

    Raises UserError as `load_settings` does.
    """
    overrides = list(overrides)
    recipe = parse_section(TrainSettings, read_named(find_recipe(path), overrides).get("train") or {}, "train.")
    changes: list[Override] = list(_CHANGES)
    if recipe.schedule == "constant-then-decay":
        changes.append(("train.decay_share", min(recipe.decay_share, _MOST_DECAY)))
    if (left_out := len(recipe.resolution) - _STEPS) > 0:
        logger.info("so short a run leaves out the first %s of train.resolution", counted(left_out, "step"))
    steps = [step.model_dump() | {"until": end} for end, step in enumerate(recipe.resolution[-_STEPS:], 1)]
    name = name or f"{Path(path).stem}-fast-{time.strftime('%m%d-%H%M%S')}"
    return load_settings(path, [*changes, ("train.resolution", steps), *overrides], name=name, storage=storage)
