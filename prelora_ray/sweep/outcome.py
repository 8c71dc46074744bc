"""Which run a candidate stands for, known before anything is trained. Candidates that agree in it are one run."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from prelora_ray.config import Settings
from prelora_ray.recorded.replay import Record, replay
from prelora_ray.sweep.settings import OF_THE_TEST, Candidate, Plan


@dataclass(frozen=True)
class Outcome:
    switch_epoch: int | None
    """None where the candidate never switches: its run is the trunk, or a control's own in full training."""
    trial: str
    """Name of the run folder."""


def outcome(plan: Plan, candidate: Candidate, trunk: Record) -> Outcome:
    """`trunk`: the record of the sweep's trunk."""
    if candidate.get("control") == "full":
        return Outcome(None, f"full-{candidate['train.bend.after']}-to-{candidate['train.epochs']}")
    settings = plan.settings_of(candidate, "check")
    found = replay(trunk, settings.method, settings.train.ramp_epochs)
    if found.switch_epoch is None or found.ranks is None or found.switch_epoch >= settings.train.epochs:
        return Outcome(None, plan.trunk.name)
    return Outcome(found.switch_epoch, _trial_name(settings, candidate, found.switch_epoch, found.ranks))


def _trial_name(settings: Settings, candidate: Candidate, switch_epoch: int, ranks: dict[str, int]) -> str:
    """Names the switch and what else was searched, and ends in a digest of all that makes the run what it is."""
    after = settings.method.model_dump(mode="json", exclude={*OF_THE_TEST, "rank_pattern"})
    digest = hashlib.blake2b(json.dumps([ranks, after], sort_keys=True).encode(), digest_size=4).hexdigest()
    told = ["rank-1"] if "control" in candidate else []
    told.append(f"switch-{switch_epoch}")
    for key, value in candidate.items():
        name = key.removeprefix("method.")
        if name in after:
            told.append(f"{name}-{value:.4g}" if isinstance(value, float) else f"{name}-{value}")
    return re.sub(r"[^A-Za-z0-9._-]", "", "_".join(told))[:100] + f"_{digest}"
