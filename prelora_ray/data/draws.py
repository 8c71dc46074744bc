"""Every random draw that decides what the model sees, keyed by what it is for.

A draw depends on its key alone: not on the number of workers, on restarts, or on what was drawn
before. So a checkpoint holds no generator's state.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a draw decides, and the key that follows the seed."""

    ORDER = 0
    """(epoch): order of the row groups and of the rows inside a buffer."""
    AUGMENT = 1
    """(epoch, sample): crop, flip, RandAugment, erasing."""
    MIX = 2
    """(epoch, batch, cell): Mixup and CutMix."""
    DROP_PATH = 3
    """(epoch, batch, cell): masks of the residual branches."""
    PREPARE = 4
    """(): order of the rows in a prepared folder, and the split."""
    MASK = 5
    """(epoch, sample): which tokens are masked, and what stands in for them."""
    FIXED_MASK = 6
    """(sample): the same of validation, without a seed."""


def generator(seed: int, draw: Draw, *key: int) -> np.random.Generator:
    """A generator for one draw; equal arguments give equal draws."""
    return np.random.default_rng((seed, int(draw), *key))
