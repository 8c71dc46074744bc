"""From the change of each module to the rank of its adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from prelora_ray.method.architecture import Target, family_of

Normalize = Literal["family", "overall"]


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


PATTERN_RANKS = "a rank is a power of two, such as 8 or 16, or 0 for no adapter"


def is_pattern_rank(n: int) -> bool:
    return n == 0 or is_power_of_two(n)


def rank_choices(r_min: int, r_max: int) -> list[int]:
    """R = r_min, 2 r_min, 4 r_min, ..., r_max.

    Raises ValueError where r_min or r_max is no power of two, or r_min > r_max.
    """
    for key, rank in (("r_min", r_min), ("r_max", r_max)):
        if not is_power_of_two(rank):
            raise ValueError(f"{key} = {rank} is not allowed: a rank is a power of two, such as 8 or 16")
    if r_min > r_max:
        raise ValueError(f"r_min = {r_min} is not allowed: it must not exceed r_max = {r_max}")
    return [r_min << i for i in range((r_max // r_min).bit_length())]


def assign_ranks(
    module_change: dict[str, float],
    r_min: int = 8,
    r_max: int = 64,
    normalize: Normalize = "family",
    floor_percent: float = 0.0,
) -> dict[str, int]:
    """Rank by module name: more change, more rank (arXiv 2509.21619, algorithm 2).

    `module_change` holds the percent change of every module over the last step between windows.
    Changes are min-max normalised to 0..1 within each family, or over all modules with
    ``normalize="overall"``; an infinite change counts as 1 and not for minimum and maximum. Modules
    that changed by less than `floor_percent` get rank 0, no adapter; the one that changed most keeps its own.
    """
    choices = rank_choices(r_min, r_max)
    groups: dict[str, list[str]] = {}
    for name in module_change:
        groups.setdefault(family_of(name) if normalize == "family" else "", []).append(name)
    ranks = {}
    for names in groups.values():
        finite = [module_change[name] for name in names if math.isfinite(module_change[name])]
        low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
        for name in names:
            change = module_change[name]
            normalized = (change - low) / (high - low) if high > low else 0.0
            if math.isinf(change):
                normalized = 1.0
            ranks[name] = choices[max(math.ceil(normalized * len(choices)) - 1, 0)]
    most = max(module_change, key=module_change.__getitem__)
    return {name: ranks[name] if change >= floor_percent or name == most else 0 for name, change in module_change.items()}


def match_rank_pattern(pattern: dict[str, int], names: Iterable[str]) -> dict[str, int]:
    """Rank by module name from ``{regular expression: rank}``.

    As in PEFT an expression matches a whole module name or a dotted suffix of it: ``query``,
    ``attn.query``, ``blocks.3.attn.query``, ``blocks.[0-5].mlp.fc.`` (escape the dots to be strict).

    Raises ValueError where a key is no expression or matches nothing, and where a module is matched
    by no key or by several.
    """
    names = list(names)
    compiled = {}
    for key, rank in pattern.items():
        try:
            compiled[key] = re.compile(rf"(.*\.)?({key})")
        except re.error as error:
            raise ValueError(f"rank_pattern key {key!r} is no regular expression: {error}") from None
        if not any(compiled[key].fullmatch(name) for name in names):
            raise ValueError(f"rank_pattern key {key!r} matches no target module; one is named {names[0]!r}")
        if not is_pattern_rank(rank):
            raise ValueError(f"rank_pattern[{key!r}] = {rank} is not allowed: {PATTERN_RANKS}")
    ranks = {}
    for name in names:
        keys = [key for key, expression in compiled.items() if expression.fullmatch(name)]
        if len(keys) != 1:
            found = f"the keys {' and '.join(map(repr, keys))}" if keys else "no key"
            raise ValueError(f"target module {name!r} is matched by {found} of rank_pattern: exactly one must match")
        ranks[name] = pattern[keys[0]]
    if not any(ranks.values()):
        raise ValueError("rank_pattern gives every module rank 0: at least one needs an adapter")
    return ranks


def check_ranks(ranks: dict[str, int], targets: Iterable[Target]) -> None:
    """Raises ValueError where a rank exceeds the smaller side of its module."""
    for target in targets:
        rank = ranks.get(target.name, 0)
        if rank > target.max_rank:
            raise ValueError(
                f"rank {rank} of {target.name!r} is not allowed: its weight is {target.out_features} x "
                f"{target.in_features}, so the rank is at most {target.max_rank}"
            )
