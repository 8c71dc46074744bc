"""What is known of a run before it starts: its recipe, and what the records of an earlier run of it tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prelora_ray.config import Settings, comparable
from prelora_ray.config_file import load_settings
from prelora_ray.data.manifest import is_prepared, parse_manifest
from prelora_ray.engine.precision import Format, phase_format
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase
from prelora_ray.plan.cost import Workload
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import EpochLine, Switch
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.summaries import by_phase_and_size, in_steady_state

_IMAGENET_IMAGES, _IMAGENET_CLASSES = 1_281_167, 1000
_STEP_KEYS = (
    *("model.", "data.batch_size", "data.cell", "train.adapters", "train.residual", "train.gradient_exchange"),
    *("train.optimizer", "train.ema", "train.compile", "train.cuda_graph", "train.micro_batch"),
    *("method.targets", "method.freeze"),
)
"""What keys begin with that a step's speed depends on, beside its `Workload`."""


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
    if folder.exists("config.yaml"):
        return _read_run(folder, _of_images(folder.read_settings(overrides)), images)
    settings = _of_images(load_settings(path, overrides))
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


def _of_images(settings: Settings) -> Settings:
    """Raises UserError for text, of which nothing was measured to plan by."""
    if settings.model.takes_text:
        raise UserError(f"task = {settings.task!r} is not allowed in a plan, which goes by measured steps of models of images")
    return settings


def workload(settings: Settings, epoch: int, phase: Phase) -> Workload:
    """What a step of an epoch (from 0) computes on a GPU, where the run is in a phase then."""
    return Workload(phase, settings.image_size(epoch), _format_on_gpu(settings, phase))


def _format_on_gpu(settings: Settings, phase: Phase) -> Format:
    train = settings.train
    return phase_format(train.precision, train.fp8_from, phase, torch.device("cuda"))


def _read_run(folder: RunFolder, settings: Settings, images: int | None) -> Source:
    """`settings`: those to plan by, which may be others than the run's own."""
    run = RunRecords(folder)
    lines, own = run.epochs, run.settings
    if not lines:
        raise UserError(f"{folder} has nothing to plan by yet: no epoch is done")
    why_not = _why_not_comparable(own, settings)
    stages = by_phase_and_size(lines if why_not is None else (), own.image_size)
    switch = run.last_of(Switch)
    return Source(
        settings,
        images or lines[-1].images,
        len(folder.read_classes()),
        lines[-1].world_size,
        None if switch is None else switch.switch_epoch,
        None if switch is None else run.ranks,
        {
            Workload(Phase(phase), size, _format_on_gpu(own, Phase(phase))): in_steady_state(its, _rate)
            for (phase, size), its in stages.items()
        },
        () if why_not is None else (f"the run's own speed is not shown: {why_not}",),
    )


def _rate(line: EpochLine) -> float:
    """Images a second and worker."""
    return line.images_per_second / line.world_size


def _why_not_comparable(own: Settings, planned: Settings) -> str | None:
    """Why a run's speed says nothing of a planned step, even of the same `Workload`; None where it does."""
    if own.workers.gpu is not True:
        return "it had no GPU"
    before, now = comparable(own), comparable(planned)
    changed = [key for key in before | now if key.startswith(_STEP_KEYS) and before.get(key) != now.get(key)]
    return f"it had {changed[0]} = {before.get(changed[0])!r}" if changed else None


def _count_images(settings: Settings, images: int | None) -> tuple[int, int, list[str]]:
    """Training images, classes, and what of it is assumed."""
    data = Storage(settings.data.path)
    if is_prepared(data):
        manifest = parse_manifest(data)
        return images or manifest.num_images("train"), len(manifest.classes), []
    assumed = [] if images else [f"{_IMAGENET_IMAGES:,} images"]
    assumed += [] if settings.model.num_classes else [f"{_IMAGENET_CLASSES:,} classes"]
    hint = "" if images else ", --images N tells"
    told = f"{settings.data.path} is not prepared here: ImageNet-1k's {' of '.join(assumed)} are assumed{hint}"
    num_classes = settings.model.num_classes or _IMAGENET_CLASSES
    return images or _IMAGENET_IMAGES, num_classes, [told] if assumed else []
