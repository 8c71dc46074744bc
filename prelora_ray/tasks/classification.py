"""Image classification: Mixup and CutMix, cross entropy against soft targets, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from prelora_ray.config import Settings
from prelora_ray.data.augment import Augmentation
from prelora_ray.data.batch import Batch
from prelora_ray.data.image_rows import ImageRows
from prelora_ray.data.manifest import Manifest
from prelora_ray.data.mixing import MixPlan, denormalize, mix, normalize, plan_mixing, soft_targets
from prelora_ray.tasks.task import Evaluation, Evaluator, Forward, Inputs, Task
from prelora_ray.words import counted


class Classification(Task):
    """`forward` takes normalised images (n, channels, height, width) to logits (n, num_classes)."""

    counts_per_sample = 1

    def __init__(self, settings: Settings, manifest: Manifest, dtype: torch.dtype) -> None:
        self.num_classes = len(manifest.classes)
        self._augment = settings.augment
        self._seed = settings.train.seed
        self._normalization = settings.normalization
        self._dtype = dtype

    @staticmethod
    def rows(settings: Settings, manifest: Manifest) -> ImageRows:
        data = settings.data
        augmentation = Augmentation(settings.model.image_size, data.mean, data.std, settings.augment)
        of_epochs = {
            epoch: Augmentation(step.image_size, data.mean, data.std, settings.augment_at(step))
            for epoch in range(settings.train.epochs)
            if (step := settings.resolution_step(epoch)) is not None
        }
        return ImageRows(augmentation, settings.train.seed, data.crop_ratio, of_epochs)

    def draw(self, batch: Batch, cells: Sequence[int], cell: int) -> Inputs:
        """Adds the plan of Mixup and CutMix, by (seed, epoch, batch, cell)."""
        inputs = dict(batch.tensors)
        if self._augment.mixes:
            key = (self._seed, batch.epoch, batch.batch, cells, cell)
            inputs |= vars(plan_mixing(self._augment, *key, batch.ids, inputs["images"].shape[1]))
        return inputs

    def loss(self, forward: Forward, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy against soft targets, and the images."""
        images, targets = self._mixed(inputs)
        losses = -(targets * F.log_softmax(forward(images).to(targets.dtype), dim=-1)).sum(-1)
        filled = inputs["labels"] >= 0
        return torch.where(filled, losses, 0).sum(), filled.sum()

    def shown(self, inputs: Inputs) -> torch.Tensor:
        return denormalize(self._mixed(inputs)[0], *self._normalization)

    def _mixed(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets of whole cells, as the model takes them."""
        images = self.normalize(inputs["images"])
        targets = soft_targets(inputs["labels"], self.num_classes, self._augment.label_smoothing, self._dtype)
        if self._augment.mixes:
            return mix(images, targets, MixPlan(inputs["offset"], inputs["weight"], inputs["box"]))
        return images, targets

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, height, width, 3) as the model takes them."""
        return normalize(images, *self._normalization, self._dtype)

    def evaluator(self, device: torch.device) -> ImageEvaluator:
        return ImageEvaluator(self.num_classes, device, self.normalize)


@dataclass(frozen=True)
class ImageEvaluation(Evaluation):
    """`loss` is the mean cross entropy."""

    top1: float
    """In 0..1."""
    top5: float
    images: int

    @property
    def told(self) -> str:
        over = counted(self.images, "image")
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f} over {over}"


class ImageEvaluator(Evaluator):
    """Sums: losses, best guesses that are right, best five with the right one, images."""

    def __init__(
        self,
        num_classes: int,
        device: torch.device,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        *,
        counts_confusion: bool = False,
    ) -> None:
        """`normalize`: from uint8 images (n, height, width, 3) to what the model takes. `counts_confusion`: whether
        `confusion` is counted, which takes num_classes squared numbers."""
        super().__init__(4, device)
        self.num_classes = num_classes
        self._normalize = normalize
        self._confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device) if counts_confusion else None

    def add(self, forward: Forward, tensors: Mapping[str, torch.Tensor]) -> None:
        """A label of -1 is an empty slot."""
        logits, labels = forward(self._normalize(tensors["images"])), tensors["labels"]
        filled = labels >= 0
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        best = logits.topk(min(5, self.num_classes)).indices
        hits = (best == labels[:, None]) & filled[:, None]
        self.sums += torch.stack([losses, hits[:, 0].sum(), hits.any(1).sum(), filled.sum()])
        if self._confusion is not None:
            cells = torch.where(filled, labels, 0) * self.num_classes + best[:, 0]
            self._confusion.scatter_add_(0, cells, filled.long())

    def result(self, sums: torch.Tensor) -> ImageEvaluation:
        loss, top1, top5, count = sums.tolist()
        return ImageEvaluation(loss / count, top1 / count, top5 / count, int(count))

    @property
    def confusion(self) -> torch.Tensor:
        """(num_classes, num_classes): images of class [row] that were taken for class [column], of this worker."""
        assert self._confusion is not None
        return self._confusion.view(self.num_classes, self.num_classes).cpu()
