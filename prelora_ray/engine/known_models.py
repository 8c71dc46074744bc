"""Which of timm's models a run takes: each is tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prelora_ray.config_file import parse_settings
from prelora_ray.engine.check import check_model
from prelora_ray.errors import UserError
from prelora_ray.torchvision_ops import make_importable

make_importable()

import timm  # noqa: E402


@dataclass(frozen=True)
class KnownModel:
    name: str
    blocks: int
    """0 where it is not taken."""
    targets: tuple[str, ...]
    """Families of its target modules, as `method.targets` takes them."""
    reason: str | None
    """Why it is not taken; None where it is."""


def known_models(pattern: str) -> Iterator[KnownModel]:
    """Tries timm's models whose names match, such as `swin*`, each at its own size of images and with its own options.

    Raises UserError where there are none.
    """
    names = timm.list_models(pattern) or [pattern] * timm.is_model(pattern)  # which may have a tag
    if not names:
        raise UserError(f"{pattern!r} is no model of timm: give a name, or a pattern such as 'swin*'")
    return map(_try, names)


def _try(name: str) -> KnownModel:
    size = timm.get_pretrained_cfg(name).input_size[-1]
    model, method = {"name": name, "image_size": size}, {"r_min": 1, "r_max": 1}
    try:
        targets = check_model(parse_settings({"name": "known", "data": {"path": "none"}, "model": model, "method": method}))
    except UserError as error:
        return KnownModel(name, 0, (), str(error))
    families = tuple(dict.fromkeys(target.family for target in targets))
    return KnownModel(name, targets[-1].layer + 1, families, None)
