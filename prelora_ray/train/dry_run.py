"""`prelora train --dry-run`: all that is checked before a run trains, and what would run. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import torch

from prelora_ray.config import Settings, with_absolute_paths
from prelora_ray.data.prepare import open_for, plan
from prelora_ray.data.prepare_text import open_text_for
from prelora_ray.engine.model import create_model
from prelora_ray.engine.snapshot import epoch_of
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import check_free
from prelora_ray.method.convergence import first_verdict
from prelora_ray.method.phases import count_parameters
from prelora_ray.ray_session import ray_session
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import Switch
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.train.checks import check_cluster, check_data, check_num_classes, check_settings, settle


@dataclass(frozen=True)
class DryRun:
    """What `prelora train` would do."""

    path: str
    """The run folder."""
    checkpoint: str | None
    """The newest one, which the run would go on from; None for a new run."""
    is_finished: bool
    """Whether nothing is left to train."""
    epoch: int
    """Completed epochs."""
    epochs: int
    switched_at: int | None
    """Completed epochs at its switch; None for a run that has not switched so far."""
    switch_epoch: int | None
    """Completed epochs at which the recipe has the run switch; None where its test decides, or it never switches."""
    first_verdict: int | None
    """Completed epochs at which the test may first have it switch; None where it is not the test that decides."""
    model: str
    sample: str
    """What it takes: `image` or `sequence`."""
    parameters: int
    """In phase full."""
    data: str
    is_prepared: bool
    """Whether the data are; images of a source would be prepared first, and unreadable ones are counted until then."""
    train_images: int | None
    """None, as val_images and batches, for a run that has finished, as its images may be gone; and for text that is to
    be prepared first."""
    val_images: int | None
    classes: int
    batches: int | None
    """Of an epoch."""
    workers: tuple[int, int]
    """Fewest and most."""
    gpu: bool
    """Whether each worker would take a GPU."""


def dry_run(settings: Settings, *, debug: bool = False) -> DryRun:
    """Checks what `train` checks, and tells what it would do. Starts Ray where `train` does, and no worker.

    Raises UserError for settings that cannot work, and where another driver trains the run.
    """
    settings = with_absolute_paths(settings)
    folder = RunFolder.of(settings)
    before = check_settings(settings, folder)
    run = RunRecords(folder)
    if before is not None and run.is_finished:
        settings = before
        train_images, val_images, classes, is_ready = None, None, len(folder.read_classes()), True
    else:
        check_free(folder)
        with ray_session(debug=debug) as is_embedded:
            settings = settle(settings, before, ray.cluster_resources().get("GPU", 0))
            check_cluster(settings, folder, is_embedded=is_embedded, writes=False)
        train_images, val_images, classes, is_ready = _count_data(settings, folder)
    data, method, workers = settings.data, settings.method, settings.workers
    names = Checkpoints(folder).names()
    batches = None if train_images is None else -(-train_images // data.batch_size)
    with torch.device("meta"):
        model = create_model(settings.model, classes, seed=0)
    first = first_verdict(method.windows, method.window_epochs, settings.train.ramp_epochs)
    decides = method.enabled and method.switch_epoch is None
    return DryRun(
        path=str(folder),
        checkpoint=names[-1] if names else None,
        is_finished=run.is_finished,
        epoch=epoch_of(names[-1]) if names else 0,
        epochs=settings.train.epochs,
        switched_at=None if (switch := run.last_of(Switch)) is None else switch.switch_epoch,
        switch_epoch=method.switch_epoch if method.enabled else None,
        first_verdict=first if first < settings.train.epochs and decides else None,
        model=settings.model.name,
        sample=settings.sample,
        parameters=count_parameters(model)[1],
        data=data.path,
        is_prepared=is_ready,
        train_images=train_images,
        val_images=val_images,
        classes=classes,
        batches=None if batches is None else min(batches, data.max_batches or batches),
        workers=(workers.min, workers.max),
        gpu=workers.gpu is True,
    )


def _count_data(settings: Settings, folder: RunFolder) -> tuple[int | None, int | None, int, bool]:
    """Images to train on and to validate with, classes, and whether they are prepared."""
    path, source = settings.data.path, settings.data.source
    if source is None or Storage(path).exists("manifest.json"):
        manifest = check_data(settings, folder)
        return manifest.num_images("train"), manifest.num_images("val"), len(manifest.classes), True
    if settings.model.takes_text:
        open_text_for(source, path, settings.data.prepare)
        return None, None, settings.model.num_classes or settings.data.prepare.vocabulary, False
    opened = open_for(source, path, settings.data.prepare)
    check_num_classes(settings, len(opened.classes))
    images = dict.fromkeys(("train", "val"), 0)
    for task in plan(opened, path, settings.data.prepare):
        images[task.split] += len(task.items)
    return images["train"], images["val"], len(opened.classes), False
