"""One optimizer step over a global batch, and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from prelora_ray.data.mixing import Mixing, mix, normalize, plan_mixing
from prelora_ray.data.stream import Batch, StreamPlan
from prelora_ray.train.model import draw_drop_path, set_drop_path
from prelora_ray.train.optim import set_learning_rate
from prelora_ray.train.state import TrainState


class NonFiniteLossError(RuntimeError):
    """Loss or gradient is no finite number: going on would only spoil the weights."""


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross entropy."""
    top1: float
    """In 0..1."""
    top5: float
    images: int


class Stepper:
    """Takes a worker's slice of each global batch through the model, and keeps the epoch's sums on the device."""

    def __init__(self, state: TrainState, plan: StreamPlan) -> None:
        self.state = state
        self.plan = plan
        augment = state.settings.augment
        self.mixing = Mixing(augment.mixup, augment.cutmix, augment.mix_probability, augment.label_smoothing)
        self.num_classes = len(plan.manifest.classes)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.state.device)
        self._bad_step = torch.full((), -1, device=self.state.device)
        self.learning_rate = 0.0

    def train(self, batch: Batch) -> None:
        """One optimizer step. The gradient is the mean over the global batch, whoever serves which part."""
        state, settings = self.state, self.state.settings
        order = self.plan.orders["train"]
        key = (settings.train.seed, batch.epoch, batch.batch, self.plan.cells, order.cell)
        mixing = plan_mixing(self.mixing, *key, batch.ids, settings.model.image_size)
        drop_path = None
        if state.drop_path:
            drop_path = draw_drop_path(state.drop_path, *key, len(batch.ids)).to(state.device, torch.float32)
        self.learning_rate = set_learning_rate(state.optimizer, settings, state.step, state.batches, state.switch_step)
        state.network.train()
        scale = state.world_size / order.batch_size(batch.batch)  # DDP takes the mean over workers
        size = settings.train.micro_batch or len(batch.ids)
        starts = range(0, len(batch.ids), size)
        for start in starts:
            micro = slice(start, start + size)
            labels = batch.labels[micro].to(state.device)
            images, targets = mix(
                self._images(batch, micro), labels, mixing[micro], self.num_classes, self.mixing.label_smoothing
            )
            set_drop_path(state.drop_path, None if drop_path is None else drop_path[:, micro])
            is_last = start == starts[-1]
            waits = isinstance(state.network, DistributedDataParallel) and not is_last
            with state.network.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with state.autocast():
                    logits = state.network(images)
                losses = -(targets * F.log_softmax(logits.to(targets.dtype), dim=-1)).sum(-1)
                filled = labels >= 0
                loss = torch.where(filled, losses, 0).sum()
                (loss * scale).backward()
            self._sums += torch.stack([loss.detach(), filled.sum()])
        norm = self._clip()
        self._bad_step = torch.where((self._bad_step < 0) & ~norm.isfinite(), state.step, self._bad_step)
        state.optimizer.step()
        state.optimizer.zero_grad()

    def check_finite(self) -> None:
        """Raises NonFiniteLossError where a step since `begin_epoch` had a gradient that is not finite.

        The gradient is the same on every worker, so all raise alike.
        """
        step = int(self._bad_step)
        if step >= 0:
            epoch, batch = divmod(step, self.state.batches)
            raise NonFiniteLossError(
                f"the loss is not finite at step {step} (epoch {epoch}, batch {batch}) in phase {self.state.phases.phase}"
            )

    def local_loss(self) -> float:
        """Mean training loss of this worker's images since `begin_epoch`; waits for the device."""
        loss, count = self._sums.tolist()
        return float(loss / count) if count else 0.0

    def epoch_sums(self) -> tuple[float, int]:
        """Sum of the training losses since `begin_epoch` and number of images, over all workers."""
        loss, count = _all_reduce(self._sums).tolist()
        return loss, int(count)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Accuracy and loss over all workers' slices, every image counted once."""
        state = self.state
        state.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=state.device)
        size = state.settings.train.micro_batch or self.plan.num_slots
        for batch in batches:
            for start in range(0, len(batch.ids), size):
                micro = slice(start, start + size)
                labels = batch.labels[micro].to(state.device)
                with state.autocast():
                    logits = state.model(self._images(batch, micro))
                filled = labels >= 0
                logits, labels = logits.to(state.dtype)[filled], labels[filled]
                if len(labels):
                    best = logits.topk(min(5, self.num_classes)).indices == labels[:, None]
                    loss = F.cross_entropy(logits, labels, reduction="sum")
                    sums += torch.stack([loss, best[:, 0].sum(), best.any(1).sum(), filled.sum()])
        loss_sum, top1, top5, count = _all_reduce(sums).tolist()
        return Evaluation(loss_sum / count, top1 / count, top5 / count, int(count))

    def _images(self, batch: Batch, micro: slice) -> torch.Tensor:
        data = self.state.settings.data
        return normalize(batch.images[micro].to(self.state.device), data.mean, data.std, self.state.dtype)

    def _clip(self) -> torch.Tensor:
        """Clips the gradient and returns the norm that it had."""
        parameters = [parameter for parameter in self.state.model.parameters() if parameter.grad is not None]
        limit = self.state.settings.train.clip_norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm


def _all_reduce(sums: torch.Tensor) -> torch.Tensor:
    sums = sums.clone()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
