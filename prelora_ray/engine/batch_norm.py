"""Batch norm whose statistics are those of a cell, so that they do not depend on workers, micro-batches or restarts.

A cell's images are normalised by their own mean and variance: ghost batch norm (Hoffer et al., arXiv 1705.08741). What
evaluation takes, the running statistics, follows the mean over all cells of a global batch. Each worker learns the rows
of its own cells, all get all rows, and each takes the mean in the cells' order, so that workers agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class CellBatchNorm2d(nn.BatchNorm2d):
    """x (n, channels, height, width), normalised in training by the statistics of each cell.

    Takes over what torch's module holds, under the same names, with the activation and what drops behind timm's.
    """

    filled: torch.Tensor | None = None
    """(cells, slots): which slots of the micro-batch hold an image; None makes one cell of all. What comes of an empty
    slot is zero."""
    is_frozen: bool = False
    """Whether training too goes by the running statistics, and leaves them as they are."""
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float
    moments: torch.Tensor
    """(cells, 2 * channels): means and unbiased variances of the cells of the last forward in training."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        """Raises ValueError where the module scales or tracks nothing."""
        if norm.weight is None or norm.running_mean is None or norm.running_var is None or norm.momentum is None:
            raise ValueError("it has no weight, no running statistics or no momentum")
        assert norm.num_batches_tracked is not None
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop, self.act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.is_frozen:
            filled = self.filled
            if filled is None:
                filled = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
            mean, variance, count = cell_moments(x.detach(), filled)
            self.moments = torch.cat([mean, variance * (count / (count - 1).clamp(min=1))], dim=1)
            x = _Normalize.apply(x, self.weight, self.bias, mean, (variance + self.eps).rsqrt(), count, filled)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        x = self.act(self.drop(x))
        return x


def cell_moments(x: torch.Tensor, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance of every cell and channel, (cells, channels), and of how many pixels they are, (cells, 1).

    `x`: (cells * slots, channels, height, width). `filled`: (cells, slots); other slots do not count, and a cell
    without any has mean and variance 0. At least in float32.
    """
    x = _in_cells(x.to(_wide(x)), filled)
    weight = filled[:, :, None, None, None].to(x.dtype)
    count = filled.sum(1, keepdim=True).to(x.dtype) * (x.shape[3] * x.shape[4])
    pixels = count.clamp(min=1)
    mean = (x * weight).sum((1, 3, 4)) / pixels
    variance = ((x - mean[:, None, :, None, None]).square() * weight).sum((1, 3, 4)) / pixels
    return mean, variance, count


class _Normalize(torch.autograd.Function):
    """(x - mean) * inverse * weight + bias, with the gradient through the cells' mean and `inverse`, 1 / deviation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        inverse: torch.Tensor,
        count: torch.Tensor,
        filled: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, inverse, count, filled)
        scale, shift = (_of_slots(tensor, filled) for tensor in (inverse * weight, bias.expand_as(mean)))
        # Not as a view, as the activation behind it works in place.
        return ((x.to(mean.dtype) - _of_slots(mean, filled)) * scale + shift).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inverse, count, filled = ctx.saved_tensors
        dy = grads[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - _of_slots(mean, filled)) * _of_slots(inverse, filled)
        used = dy * _of_slots(torch.ones_like(mean), filled)
        dbias, dweight = (_in_cells(tensor, filled).sum((1, 3, 4)) for tensor in (used, used * normal))
        pixels = count.clamp(min=1)
        through = _of_slots(dbias / pixels, filled) + normal * _of_slots(dweight / pixels, filled)
        dx = (used - through) * _of_slots(inverse * weight, filled)
        return dx.to(x.dtype), dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype), None, None, None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _in_cells(x: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """(cells * slots, ...) to (cells, slots, ...)."""
    return x.reshape(*filled.shape, *x.shape[1:])


def _of_slots(of_cells: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """(cells, channels) to (cells * slots, channels, 1, 1), zero where a slot is empty."""
    return (of_cells[:, None] * filled[:, :, None]).flatten(0, 1)[:, :, None, None]


def use_cells(model: nn.Module) -> None:
    """Puts batch norm over cells in place of a model's own. Raises ValueError where it has one of another kind."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if not isinstance(module, nn.BatchNorm2d):
            raise ValueError(f"{name} is a {type(module).__name__}, and batch norm is known over images alone")
        try:
            model.set_submodule(name, CellBatchNorm2d(module))
        except ValueError as error:
            raise ValueError(f"{name} is a batch norm that is not known: {error}") from None


def cell_norms(model: nn.Module) -> list[CellBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, CellBatchNorm2d)]


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running means and variances of a model's batch norms, in order."""
    return [tensor for norm in cell_norms(model) for tensor in (norm.running_mean, norm.running_var)]


class CellStatistics:
    """What a step learns of its cells, and the running statistics that follow it."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = cell_norms(model)
        self._rows: list[torch.Tensor] = []
        self._is_frozen = False

    def freeze(self, is_frozen: bool) -> None:
        """Whether training goes by the running statistics from now on."""
        self._is_frozen = is_frozen
        for norm in self._norms:
            norm.is_frozen = is_frozen

    def begin(self) -> None:
        """Forgets what was learnt before."""
        self._rows = []

    @contextmanager
    def learning(self, filled: torch.Tensor) -> Iterator[None]:
        """For the forward and backward of a micro-batch, of whose slots `filled`, (cells, slots), hold an image."""
        for norm in self._norms:
            norm.filled = filled
        try:
            yield
            if not self._is_frozen:
                images = filled.sum(1, keepdim=True).to(self._norms[0].moments.dtype)
                self._rows.append(torch.cat([images, *(norm.moments for norm in self._norms)], dim=1))
        finally:
            for norm in self._norms:
                norm.filled = None

    @torch.no_grad()
    def update(self, cells: Sequence[int], num_cells: int) -> None:
        """Takes the mean over all cells of the global batch into the running statistics, once a step.

        `cells`: those that this worker has learnt, of `num_cells`. All workers call it together. A cell counts as many
        times as it has images.
        """
        if self._is_frozen:
            return
        rows = torch.cat(self._rows)[: len(cells)]  # what else there is fills up a worker's slots
        if len(cells) < num_cells:
            own = rows
            rows = own.new_zeros(num_cells, own.shape[1])
            rows[cells[0] : cells[-1] + 1] = own
            dist.all_reduce(rows)  # exact: of each row's terms all but one are zero
        images, *moments = rows.double().split([1, *(norm.moments.shape[1] for norm in self._norms)], dim=1)
        share = images / images.sum()
        for norm, of_norm in zip(self._norms, moments, strict=True):
            mean, variance = (share * of_norm).sum(0).to(norm.running_mean.dtype).chunk(2)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance, norm.momentum)
            norm.num_batches_tracked += 1
