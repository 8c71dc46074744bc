"""What is known of a run before it starts: its recipe, and what the records of an earlier run of it tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prelora_ray.config import Settings
from prelora_ray.config_file import load_settings
from prelora_ray.data.manifest import is_prepared, parse_manifest
from prelora_ray.engine.precision import phase_format
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase
from prelora_ray.plan.cost import Workload
from prelora_ray.records import EpochLine, Switch, in_steady_state
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage

_IMAGENET_IMAGES, _IMAGENET_CLASSES = 1_281_167, 1000


@dataclass(frozen=True)
class Source:
    settings: Settings
    images: int
    """Training images."""
    num_classes: int
    gpus: int
    """The most that the recipe takes, or what the run had last."""
    switch_epoch: int | None
    """None where it is not known, or the recipe never switches."""
    ranks: dict[str, int] | None
    """By module name; None where they are not known."""
    measured: dict[Workload, float]
    """Images a second and GPU of a run, in the steady state of each kind of epoch."""
    notes: tuple[str, ...]
    """What is assumed."""


def read_source(path: str, overrides: Sequence[str], images: int | None) -> Source:
    """Of a recipe or a run folder. `images` stands in for the number of training images.

    Raises UserError where it is neither, or a run has not finished an epoch.
    """
    folder = RunFolder(path)
    if folder.is_local and folder.exists("config.yaml"):
        return _read_run(folder, load_settings(folder.file("config.yaml"), overrides), images)
    settings = load_settings(path, overrides)
    found, num_classes, notes = _count_images(settings, images)
    if settings.data.max_batches is not None:
        found = min(found, settings.data.max_batches * settings.data.batch_size)
    method = settings.method
    if method.enabled and method.switch_epoch is None:
        notes.append("the recipe's own test decides when it switches: each row is what one answer would come to")
    if method.enabled and method.rank_pattern is None:
        notes.append(f"ranks of {method.r_min} to {method.r_max} are dealt out evenly, as the rule's are known at the switch")
    switch_epoch = method.switch_epoch if method.enabled else None
    return Source(settings, found, num_classes, settings.workers.max, switch_epoch, None, {}, tuple(notes))


def workload(settings: Settings, epoch: int, phase: Phase) -> Workload:
    """What a step of an epoch (from 0) computes on a GPU, where the run is in a phase then."""
    train = settings.train
    format_ = phase_format(train.precision, train.fp8_from, phase, torch.device("cuda"))
    return Workload(phase, settings.image_size(epoch), format_)


def _read_run(folder: RunFolder, settings: Settings, images: int | None) -> Source:
    lines = folder.epochs()
    if not lines:
        raise UserError(f"{folder} has nothing to plan by yet: no epoch is done")
    kinds: dict[Workload, list[EpochLine]] = {}
    for line in lines:
        kinds.setdefault(workload(settings, line.epoch, Phase(line.phase)), []).append(line)
    switches = [event.switch_epoch for event in folder.events() if isinstance(event, Switch)]
    return Source(
        settings,
        images or lines[-1].images,
        len(folder.read_classes()),
        lines[-1].world_size,
        switches[-1] if switches else None,
        folder.read_json("ranks.json") if switches else None,
        {kind: in_steady_state(own, lambda line: line.images_per_second / line.world_size) for kind, own in kinds.items()},
        (),
    )


def _count_images(settings: Settings, images: int | None) -> tuple[int, int, list[str]]:
    """Training images, classes, and what of it is assumed."""
    if images is not None:
        return images, _IMAGENET_CLASSES, []
    data = Storage(settings.data.path)
    if is_prepared(data):
        manifest = parse_manifest(data)
        return manifest.num_images("train"), len(manifest.classes), []
    note = f"{settings.data.path} is not prepared here: ImageNet-1k's {_IMAGENET_IMAGES:,} images are assumed, --images N tells"
    return _IMAGENET_IMAGES, _IMAGENET_CLASSES, [note]
