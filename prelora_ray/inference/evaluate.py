"""What a trained model comes to over a prepared validation set: top-1, top-5 and loss; or those of masked tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch

from prelora_ray.data.batch import Pass, Rows, StreamPlan
from prelora_ray.data.damage import DamagedDataError
from prelora_ray.data.image_rows import ImageRows
from prelora_ray.data.manifest import Manifest, read_manifest
from prelora_ray.data.mixing import normalize
from prelora_ray.data.order import Order
from prelora_ray.data.stream import stream_batches
from prelora_ray.data.token_rows import TokenRows
from prelora_ray.errors import UserError
from prelora_ray.inference.fit import check_fits
from prelora_ray.inference.load import OnnxModel, TrainedModel, load_trained
from prelora_ray.nodes import check_seen_by_all_nodes
from prelora_ray.storage import Storage
from prelora_ray.tasks.classification import ImageEvaluation, ImageEvaluator
from prelora_ray.tasks.masked_language import TokenEvaluation, TokenEvaluator

_BATCH = 256
_SEQUENCES = 32
"""At once through the model, as each has many logits."""


@dataclass(frozen=True)
class EvaluationReport:
    evaluation: ImageEvaluation | TokenEvaluation
    classes: tuple[str, ...]
    confusion: torch.Tensor | None
    """(classes, classes), int64: images of class [row] that were taken for class [column]. None of text."""

    @property
    def class_top1(self) -> list[float | None]:
        """Share of each class's images that were taken for it; None for a class without images. Empty of text."""
        if self.confusion is None:
            return []
        counts = self.confusion.sum(1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


def evaluate(
    source: str, data: str | None = None, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> EvaluationReport:
    """Evaluates `source` (whatever `load_trained` takes) on the validation images, or the text, of `data`. Needs a
    running Ray.

    Without `data` they are those that the run was trained with. Uses a GPU where Ray has one. `on_progress`
    is called with the images or sequences done and their total.

    Raises UserError where there is no such model or data, or their classes differ; DamagedDataError where an image
    cannot be read.
    """
    model = load_trained(source)
    data = data or model.data
    if data is None:
        raise UserError(f"{source!r} does not know its data: name a prepared folder to evaluate it on")
    folder = Storage(data)
    manifest = read_manifest(folder)
    check_fits(source, model, data, manifest)
    total = manifest.num_images("val")
    if not total:
        raise UserError(f"{data!r} has nothing to validate with")
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
    """Yields the number of samples done so far after each batch, and in the end the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = model.module.to(device)
    rows: Rows
    evaluator: ImageEvaluator | TokenEvaluator
    if (preprocessing := model.preprocessing) is None:
        assert manifest.text is not None, "model and data are checked against each other"
        rows, size = TokenRows(manifest.text, len(manifest.classes), seed=0), _SEQUENCES
        evaluator = TokenEvaluator(device)
    else:
        rows, size = ImageRows(preprocessing.augmentation, 0, preprocessing.crop_ratio), _BATCH
        prepare = partial(normalize, mean=preprocessing.mean, std=preprocessing.std)
        evaluator = ImageEvaluator(len(manifest.classes), device, prepare, counts_confusion=True)
    order = Order(manifest.row_groups("val"), num_cells=1, cell=_BATCH, seed=None)
    batches = stream_batches(StreamPlan(path, manifest, {"val": order}, rows, 0, 1), [Pass("val", 0)], decoders)
    done = 0
    for samples in evaluator.run(module, batches, size):
        done += samples
        yield done
    confusion = evaluator.confusion if isinstance(evaluator, ImageEvaluator) else None
    yield EvaluationReport(evaluator.result(evaluator.sums), manifest.classes, confusion)
