"""Where any tau and zeta would have switched a recorded run, and what that would have meant, all from one replay."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from prelora_ray.config import MethodSettings, Settings
from prelora_ray.engine.model import create_model
from prelora_ray.errors import UserError
from prelora_ray.method.adapters import inject
from prelora_ray.method.architecture import find_targets
from prelora_ray.method.phases import count_parameters, freeze_parameters
from prelora_ray.recorded.replay import Record, replay
from prelora_ray.run_folder import RunFolder
from prelora_ray.schedule import ranks_for
from prelora_ray.summaries import by_phase_and_size, in_steady_state

PUBLISHED = {"relaxed": (1.0, 5.0), "medium": (0.5, 2.5), "strict": (0.25, 1.0)}
"""The paper's settings of the test: (tau, zeta) by name."""


@dataclass(frozen=True)
class Point:
    tau: float
    zeta: float
    switch_epoch: int | None
    """None where the record does not switch; what follows is then None too."""
    ranks: dict[str, int] | None
    trainable_fraction: float | None
    """In phase lora; None too where the model is not known."""
    rate_left: float | None
    """Share of the learning rate's sum that is left at the switch; None too where the run's settings are not known."""
    hours: float | None
    """Wall-clock of the whole run at the phases' measured speed; None too where a phase was not measured with images of
    a size that it would have."""


@dataclass(frozen=True)
class Meaning:
    """What a switch means for the run that was recorded."""

    trainable_fraction: Callable[[dict[str, int]], float]
    """Share of the parameters that phase lora trains with some ranks."""
    epoch_seconds: dict[tuple[str, int], float]
    """Duration of an epoch in the steady state, by phase and size of images."""
    image_sizes: list[int]
    """Of each of the run's epochs."""

    def hours(self, switch_epoch: int, warmup_epochs: int) -> float | None:
        phases = ["full"] * switch_epoch + ["warmup"] * warmup_epochs + ["lora"] * len(self.image_sizes)
        stages = list(zip(phases, self.image_sizes, strict=False))  # to the run's end, wherever that is
        if any(stage not in self.epoch_seconds for stage in stages):
            return None
        return sum(self.epoch_seconds[stage] for stage in stages) / 3600


def what_it_means(source: str, method: MethodSettings) -> Meaning | None:
    """For a run folder; None for a bare record, of which the model is not known."""
    folder = RunFolder(source)
    if not folder.exists("config.yaml"):
        return None
    settings = folder.read_settings()
    stages = by_phase_and_size(folder.epochs(), settings.image_size)
    seconds = {stage: in_steady_state(lines, lambda line: line.seconds) for stage, lines in stages.items()}
    fraction = _trainable_fraction(settings, len(folder.read_classes()), method)
    return Meaning(fraction, seconds, [settings.image_size(epoch) for epoch in range(settings.train.epochs)])


def switch_map(
    record: Record,
    method: MethodSettings,
    ramp_epochs: int,
    taus: list[float],
    zetas: list[float],
    meaning: Meaning | None = None,
) -> list[Point]:
    """A point for each tau and, inside, each zeta; the other settings of the test are `method`'s."""
    never = method.model_copy(update={"tau": 0.0, "zeta": 0.0, "switch_epoch": None})
    verdicts = replay(record, never, ramp_epochs).verdicts
    norms = list(record.epochs[0].norms)
    switches: dict[int, Point] = {}
    points = []
    for tau, zeta in itertools.product(taus, zetas):
        verdict = next((verdict for verdict in verdicts if verdict.is_under(tau, zeta)), None)
        if verdict is None:
            points.append(Point(tau, zeta, None, None, None, None, None))
            continue
        epoch = verdict.window.epoch_end
        if epoch not in switches:
            assert verdict.module_change is not None, "one window has no change, and no verdict under any limit"
            ranks = ranks_for(method, verdict.module_change, norms)
            fraction = meaning.trainable_fraction(ranks) if meaning else None
            hours = meaning.hours(epoch, method.warmup_epochs) if meaning else None
            left = record.rates_left[epoch] if record.rates_left else None
            switches[epoch] = Point(tau, zeta, epoch, ranks, fraction, left, hours)
        points.append(replace(switches[epoch], tau=tau, zeta=zeta))
    return points


def _trainable_fraction(settings: Settings, num_classes: int, method: MethodSettings) -> Callable[[dict[str, int]], float]:
    with torch.device("meta"):
        model = create_model(settings.model, num_classes, settings.train.seed)
    targets = find_targets(model, method.targets)

    def fraction(ranks: dict[str, int]) -> float:
        adapted = copy.deepcopy(model)
        try:
            inject(adapted, targets, ranks)
        except ValueError as error:
            raise UserError(f"the ranks do not fit the recorded model: {error}") from None
        freeze_parameters(adapted, targets, method.freeze)
        trainable, parameters = count_parameters(adapted)
        return trainable / parameters

    return fraction
