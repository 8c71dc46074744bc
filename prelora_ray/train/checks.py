"""What is checked before a run starts its workers, and what of its settings is settled there."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import ray
import torch

from prelora_ray.config import Settings, acts, comparable, settled_alike
from prelora_ray.data.manifest import Manifest, read_manifest
from prelora_ray.engine.check import check_model, drop_path_form
from prelora_ray.engine.model import check_length, create_model
from prelora_ray.engine.precision import check_precision
from prelora_ray.engine.pretrained import load_pretrained
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.monitor import loggers
from prelora_ray.nodes import check_seen_by_all_nodes
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage, check_out_folder
from prelora_ray.train.initial_weights import check_vocabulary, initial_weights
from prelora_ray.train.no_effect import without_effect
from prelora_ray.words import counted

logger = logging.getLogger(__name__)


def check_settings(settings: Settings, folder: RunFolder) -> Settings | None:
    """All that can be checked before Ray starts. Returns the settings that the run was begun with, where it was.

    `settings`: with absolute paths. Raises UserError for settings that cannot work.
    """
    before = folder.read_settings() if folder.exists("config.yaml") else None
    if before is not None:
        _check_unchanged(before, settings, folder)
        Checkpoints(folder).check_schema()
        if folder.exists("data.json"):
            folder.read_classes()  # raises, where it is damaged, before Ray starts
    if folder.exists("result.json"):
        return before
    is_ready = Storage(settings.data.path).exists("manifest.json")
    for path in _written(settings, folder, is_ready=is_ready):
        check_out_folder(path)
    loggers.check_loggers(settings)
    check_model(settings)
    if (source := settings.model.init_from) is not None and before is None:
        tensors = initial_weights(source)  # raises early
        if not settings.model.takes_text:  # whose number of tokens comes with the data
            load_pretrained(create_model(settings.model, num_classes=1, seed=0), tensors, source)
    if not is_ready and settings.data.source is None:
        read_manifest(Storage(settings.data.path))  # raises, and says how to prepare it
    for sentence in without_effect(settings):
        logger.warning("%s", sentence)
    return before


def settle(settings: Settings, before: Settings | None, gpus: float) -> Settings:
    """The settings with `model.drop_path_form: auto` and `workers.gpu: auto` resolved.

    `before`: as `check_settings` returns it, whose values stay. `gpus`: that Ray has.
    """
    return _settle_gpu(_settle_drop_path(settings, before), before, gpus)


def check_cluster(settings: Settings, folder: RunFolder, *, is_embedded: bool, writes: bool = True) -> None:
    """Checks the Ray that runs: its room, and what its nodes see.

    `settings`: from `settle`. Without `writes` no folder is made to see whether all nodes see it; the one that it would
    be made in is looked for. Raises UserError where the run cannot work there.
    """
    _check_room(settings, is_embedded)
    _check_nodes_see(settings, folder, writes=writes)
    if not settings.workers.gpu:
        check_precision(settings.train.precision, torch.device("cpu"))


def check_data(settings: Settings, folder: RunFolder) -> Manifest:
    """The manifest of the prepared data. Raises UserError where they are not whole, or not what the run began with."""
    manifest = read_manifest(Storage(settings.data.path))
    if manifest.task != settings.task:
        raise UserError(
            f"data.path = {settings.data.path!r} is not allowed with task = {settings.task!r}: it was prepared for "
            f"{manifest.task!r}"
        )
    check_num_classes(settings, len(manifest.classes))
    if manifest.text is not None:
        source = None if folder.exists("data.json") else settings.model.init_from
        with contextlib.nullcontext() if source else torch.device("meta"):
            model = create_model(settings.model, len(manifest.classes), seed=0)
        check_length(model, settings.data.path, manifest.text.sequence_length)
        if source is not None:
            tensors = initial_weights(source)  # raises where it is no run, export or file
            check_vocabulary(source, settings.data.path, manifest)
            load_pretrained(model, tensors, source)
    for split in manifest.splits:
        if not manifest.num_images(split):
            raise UserError(f"data.path = {settings.data.path!r} is not allowed: it has no {settings.sample}s in {split}")
    if folder.exists("data.json") and folder.read_json("data.json") != identity(manifest):
        raise UserError(
            f"data.path = {settings.data.path!r} is not allowed: run {folder} was begun with other {settings.sample}s; "
            "resume it with those, or give another --name"
        )
    return manifest


def check_num_classes(settings: Settings, classes: int) -> None:
    """Raises UserError where the data have another number of classes than the recipe says."""
    if settings.model.num_classes not in (None, classes):
        has = counted(classes, "token") if settings.model.takes_text else counted(classes, "class", "classes")
        raise UserError(
            f"model.num_classes = {settings.model.num_classes} is not allowed: {settings.data.path!r} has {has}; leave it out "
            "to take theirs"
        )


def identity(manifest: Manifest) -> dict[str, Any]:
    """What a run is trained on, as data.json holds it."""
    return {"classes": list(manifest.classes), "fingerprint": manifest.fingerprint}


def _check_unchanged(before: Settings, now: Settings, folder: RunFolder) -> None:
    """Raises UserError where a run is resumed with settings that would change its result."""
    old, new = comparable(before), comparable(settled_alike(now, before))
    for key in sorted(old | new):
        if old.get(key) == new.get(key) or acts(key) == "never":
            continue
        told = f"{key} = {new.get(key)!r} is not allowed: run {folder} was begun with {old.get(key)!r}"
        if key == "train.epochs" and now.train.epochs > before.train.epochs:
            raise UserError(
                f"{told}, over which its learning rate falls; more epochs are another run, which may begin with its weights: "
                f"prelora train RECIPE --name ANOTHER --set {key}={now.train.epochs} --set model.init_from={folder}"
            )
        raise UserError(f"{told}; resume it with that, or give another --name")


def _written(settings: Settings, folder: RunFolder, *, is_ready: bool) -> list[str]:
    """The folders that the run writes into: its own, and that of images where they are still to be prepared."""
    return [str(folder)] if is_ready else [settings.data.path, str(folder)]


def _settle_drop_path(settings: Settings, before: Settings | None) -> Settings:
    """The settings with `model.drop_path_form: auto` resolved: to what the run had, or at first by model and cell."""
    if before is not None:
        settings = settled_alike(settings, before)
    model = settings.model
    if model.drop_path_form != "auto" or model.drop_path == 0:
        return settings
    form, why_not = drop_path_form(model, settings.data.cell)
    logger.info("model.drop_path_form: auto is %s%s", form, "" if why_not is None else f", as of subset is said: {why_not}")
    return settings.model_copy(update={"model": model.model_copy(update={"drop_path_form": form})})


def _settle_gpu(settings: Settings, before: Settings | None, gpus: float) -> Settings:
    """The settings with `workers.gpu: auto` resolved: to what the run had, or at first whether Ray has enough GPUs."""
    workers = settings.workers
    if workers.gpu != "auto":
        return settings
    if before is not None and before.workers.gpu != "auto":
        gpu, why = before.workers.gpu, "as the run has had it so far"
    else:
        gpu = workers.take_gpus(gpus)
        why = f"as Ray has {counted(int(gpus), 'GPU')} and workers.min is {workers.min}"
        why += "" if gpu else "; for GPUs that come once they are asked for, set it to true"
    logger.info("workers.gpu: auto is %s, %s", str(gpu).lower(), why)
    return settings.model_copy(update={"workers": workers.model_copy(update={"gpu": gpu})})


def _check_room(settings: Settings, is_embedded: bool) -> None:
    """Ray Train waits for room silently: warns of that, and raises UserError where room can never come."""
    workers, has = settings.workers, ray.cluster_resources()
    for resource, each in (("CPU", workers.cpus), ("GPU", 1.0 if workers.gpu is True else 0.0)):
        needed, there = workers.min * each, has.get(resource, 0)
        if needed <= there:
            continue
        of_each = f"of {each:g} {resource}"
        told = (
            counted(workers.min, f"worker {of_each} needs", f"workers {of_each} need") + f" {needed:g}, and Ray has {there:g}"
        )
        if is_embedded:
            instead = "; workers.gpu: false trains on CPUs" if resource == "GPU" else ""
            raise UserError(f"workers.min = {workers.min} is not allowed on this machine: {told}{instead}")
        logger.warning("waiting for room: %s", told)


def _check_nodes_see(settings: Settings, folder: RunFolder, *, writes: bool) -> None:
    """Raises UserError, before anything is prepared or trained, where a node does not see a local path of the run."""
    data, is_ready = settings.data, Storage(settings.data.path).exists("manifest.json")
    images, written = data.path if is_ready else data.source, _written(settings, folder, is_ready=is_ready)
    reads = [path for path in (images, settings.model.init_from) if path is not None]
    check_seen_by_all_nodes(reads, written, touches=writes)
