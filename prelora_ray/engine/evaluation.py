"""Accuracy and loss of a model over validation batches, every image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from prelora_ray.data.batch import Batch
from prelora_ray.data.mixing import to_device


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
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
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
        self._sums += torch.stack([losses, hits[:, 0].sum(), hits.any(1).sum(), filled.sum()])
        if self._confusion is not None:
            cells = torch.where(filled, labels, 0) * self.num_classes + best[:, 0]
            self._confusion.scatter_add_(0, cells, filled.long())

    def result(self) -> Evaluation:
        """Over all workers."""
        loss, top1, top5, count = all_reduce(self._sums).tolist()
        return Evaluation(loss / count, top1 / count, top5 / count, int(count))

    @property
    def confusion(self) -> torch.Tensor:
        """(num_classes, num_classes): images of class [row] that were taken for class [column], of this worker."""
        assert self._confusion is not None
        return self._confusion.view(self.num_classes, self.num_classes).cpu()


def all_reduce(sums: torch.Tensor) -> torch.Tensor:
    """The sum over all workers, on each of them; what was passed in where there is one worker."""
    sums = sums.clone()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
