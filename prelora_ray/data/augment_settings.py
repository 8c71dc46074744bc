"""How training images are varied: by itself on CPUs (`augment.py`), and with others of its cell (`mixing.py`)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from prelora_ray.section import NotNegative, Section, Share, Whole

_POLICY = re.compile(
    r"3a|rand(-(m\d+|n[1-9]|mmax[1-9]\d*|mstd\d+(\.\d*)?|p(0(\.\d*)?|1(\.0*)?)|inc[01]|t(weights|3a|3aw)))*", re.ASCII
)
"""What timm's parser takes; what it passes over silently, such as a section without a number, is left out."""


def _check_policy(policy: str) -> str:
    if not _POLICY.fullmatch(policy):
        raise ValueError(
            "must be `3a` or a RandAugment policy such as `rand-m9-mstd0.5-inc1`: whole numbers behind m, n (1 to 9) and "
            "mmax, numbers behind mstd and p (at most 1), 0 or 1 behind inc, and behind t `weights`, `3a` or `3aw`"
        )
    return policy


Policy = Annotated[str, AfterValidator(_check_policy)]
"""RandAugment in timm's notation, or `3a`."""


class AugmentSettings(Section):
    crop: Literal["random_resized", "padded", "center"] = "random_resized"
    """A crop of random area and aspect ratio; or a shifted crop of the image with a black border; or none."""
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image's area in a random resized crop."""
    padding: Whole = 4
    """Border of a padded crop, in pixels at `model.image_size`; of smaller images, in proportion."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    policy: Policy | None = None
    """RandAugment in timm's notation, such as `rand-m9-mstd0.5-inc1`, or `3a` for DeiT III's 3-Augment."""
    color_jitter: NotNegative = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    erase: Share = 0.0
    """Probability of random erasing."""
    mixup: NotNegative = 0.0
    """Mixup's alpha; 0 is off."""
    cutmix: NotNegative = 0.0
    """CutMix's alpha; 0 is off. With both, each cell takes one of them."""
    mix_probability: Share = 1.0
    """Probability that a cell is mixed."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread over all classes."""

    @property
    def mixes(self) -> bool:
        """Whether any cell is mixed."""
        return bool(self.mix_probability and (self.mixup or self.cutmix))
