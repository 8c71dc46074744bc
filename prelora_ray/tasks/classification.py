"""Image classification: Mixup and CutMix, cross entropy against soft targets, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from prelora_ray.config import Settings
from prelora_ray.data.batch import Batch, to_device
from prelora_ray.data.mixing import MixPlan, denormalize, mix, normalize, plan_mixing, soft_targets

Inputs = dict[str, torch.Tensor]
"""By name, tensors with a row for each slot."""
Forward = Callable[[torch.Tensor], torch.Tensor]
"""Normalised images (n, channels, height, width) to logits (n, num_classes)."""


class Classification:
    """What a run's batches mean to a model that makes logits."""

    def __init__(self, settings: Settings, num_classes: int, dtype: torch.dtype) -> None:
        """`dtype`: of images and targets."""
        self.num_classes = num_classes
        self._augment = settings.augment
        self._seed = settings.train.seed
        self._normalization = settings.normalization
        self._dtype = dtype

    def draw(self, batch: Batch, cells: Sequence[int], cell: int) -> Inputs:
        """All that a batch's loss depends on but the model, on the CPU: its cells' tensors and what is drawn for each.

        `cells`: their numbers in the global batch, with `cell` slots each.
        """
        inputs = {"images": batch.images, "labels": batch.labels}
        if self._augment.mixes:
            key = (self._seed, batch.epoch, batch.batch, cells, cell)
            inputs |= vars(plan_mixing(self._augment, *key, batch.ids, batch.images.shape[1]))
        return inputs

    def loss(self, forward: Forward, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses of whole cells on the device, and how many images they are; empty slots count nothing."""
        images, targets = self._mixed(inputs)
        losses = -(targets * F.log_softmax(forward(images).to(targets.dtype), dim=-1)).sum(-1)
        filled = inputs["labels"] >= 0
        return torch.where(filled, losses, 0).sum(), filled.sum()

    def shown(self, inputs: Inputs) -> torch.Tensor:
        """The images that `loss` takes of whole cells, to look at: uint8 (n, height, width, channels)."""
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


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross entropy."""
    top1: float
    """In 0..1."""
    top5: float
    images: int


class Evaluator:
    """Sums over batches, kept on the device until they are asked for."""

    def __init__(self, num_classes: int, device: torch.device, *, counts_confusion: bool = False) -> None:
        """`counts_confusion`: whether `confusion` is counted, which takes num_classes squared numbers."""
        self.num_classes = num_classes
        self.device = device
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        """Of this worker: losses, best guesses that are right, best five with the right one, images."""
        self._confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device) if counts_confusion else None

    @torch.no_grad()
    def run(self, predict: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Batch], micro_batch: int) -> Iterator[int]:
        """Takes `predict` (uint8 images on the device to logits) through all batches; yields the images of each."""
        for batch in batches:
            for start in range(0, len(batch.ids), micro_batch):
                micro = slice(start, start + micro_batch)
                self.add(predict(to_device(batch.images[micro], self.device)), to_device(batch.labels[micro], self.device))
            yield int((batch.ids >= 0).sum())

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Counts `logits` (n, num_classes) against `labels` (n,); a label of -1 is an empty slot."""
        filled = labels >= 0
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        best = logits.topk(min(5, self.num_classes)).indices
        hits = (best == labels[:, None]) & filled[:, None]
        self.sums += torch.stack([losses, hits[:, 0].sum(), hits.any(1).sum(), filled.sum()])
        if self._confusion is not None:
            cells = torch.where(filled, labels, 0) * self.num_classes + best[:, 0]
            self._confusion.scatter_add_(0, cells, filled.long())

    def result(self, sums: torch.Tensor) -> Evaluation:
        """What `sums` come to: this worker's own, or those of all."""
        loss, top1, top5, count = sums.tolist()
        return Evaluation(loss / count, top1 / count, top5 / count, int(count))

    @property
    def confusion(self) -> torch.Tensor:
        """(num_classes, num_classes): images of class [row] that were taken for class [column], of this worker."""
        assert self._confusion is not None
        return self._confusion.view(self.num_classes, self.num_classes).cpu()
