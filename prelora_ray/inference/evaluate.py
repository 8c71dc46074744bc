"""Top-1, top-5 and loss of a trained model over a prepared validation set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from prelora_ray.data.batch import Pass, StreamPlan
from prelora_ray.data.damage import DamagedDataError
from prelora_ray.data.manifest import Manifest, read_manifest
from prelora_ray.data.mixing import normalize
from prelora_ray.data.order import Order
from prelora_ray.data.stream import stream_batches
from prelora_ray.errors import UserError
from prelora_ray.inference.load import OnnxModel, TrainedModel, load_trained
from prelora_ray.nodes import check_seen_by_all_nodes
from prelora_ray.storage import Storage
from prelora_ray.tasks.classification import Evaluation, Evaluator
from prelora_ray.words import counted

_BATCH = 256


@dataclass(frozen=True)
class EvaluationReport:
    evaluation: Evaluation
    classes: tuple[str, ...]
    confusion: torch.Tensor
    """(classes, classes), int64: images of class [row] that were taken for class [column]."""

    @property
    def class_top1(self) -> list[float | None]:
        """Share of each class's images that were taken for it; None for a class without images."""
        counts = self.confusion.sum(1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


def evaluate(
    source: str, data: str | None = None, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> EvaluationReport:
    """Evaluates `source` (whatever `load_trained` takes) on the validation images of `data`. Needs a running Ray.

    Without `data` they are those that the run was trained with. Uses a GPU where Ray has one. `on_progress`
    is called with the images done and their total.

    Raises UserError where there is no such model or data, or their classes differ; DamagedDataError where an image
    cannot be read.
    """
    model = load_trained(source)
    data = data or model.data
    if data is None:
        raise UserError(f"{source!r} does not know its data: name a prepared folder to evaluate it on")
    folder = Storage(data)
    manifest = read_manifest(folder)
    _check_classes(source, model.classes, data, manifest.classes)
    total = manifest.num_images("val")
    if not total:
        raise UserError(f"{data!r} has no validation images")
    check_seen_by_all_nodes([str(folder), *([model.module.path] if isinstance(model.module, OnnxModel) else [])])
    resources = ray.cluster_resources()
    task = ray.remote(num_cpus=1, num_gpus=min(1, int(resources.get("GPU", 0))))(_evaluate)
    decoders = max(1, int(resources.get("CPU", 1)) - 1)
    try:
        for reference in task.options(num_returns="streaming").remote(model, str(folder), manifest, decoders):
            done = ray.get(reference)
            if isinstance(done, EvaluationReport):
                return done
            on_progress(done, total)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DamagedDataError):
            raise error.cause from None  # without Ray's traceback for a text
        raise
    raise AssertionError("the task ends with a report")


def _evaluate(model: TrainedModel, path: str, manifest: Manifest, decoders: int) -> Iterator[Any]:
    """Yields the number of images done so far after each batch, and in the end the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = model.module.to(device)
    preprocessing = model.preprocessing

    def predict(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = module(normalize(images, preprocessing.mean, preprocessing.std))
        return logits

    evaluator = Evaluator(len(manifest.classes), device, counts_confusion=True)
    batches = stream_batches(_plan(model, path, manifest), [Pass("val", 0)], decoders)
    done = 0
    for images in evaluator.run(predict, batches, _BATCH):
        done += images
        yield done
    yield EvaluationReport(evaluator.result(evaluator.sums), manifest.classes, evaluator.confusion)


def _plan(model: TrainedModel, path: str, manifest: Manifest) -> StreamPlan:
    preprocessing = model.preprocessing
    order = Order(manifest.row_groups("val"), num_cells=1, cell=_BATCH, seed=None)
    return StreamPlan(path, manifest, {"val": order}, preprocessing.augmentation, 0, preprocessing.crop_ratio, 0, 1)


def _check_classes(source: str, model: tuple[str, ...], data: str, prepared: tuple[str, ...]) -> None:
    if model == prepared:
        return
    if len(model) != len(prepared):
        raise UserError(
            f"{data!r} has {counted(len(prepared), 'class', 'classes')}, and {source!r} was trained on {len(model)}"
        )
    i = next(i for i in range(len(model)) if model[i] != prepared[i])
    raise UserError(f"class {i} is {prepared[i]!r} in {data!r}, and {source!r} was trained with {model[i]!r}")
