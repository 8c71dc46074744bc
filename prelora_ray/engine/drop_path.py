"""Stochastic depth, drawn by key: residual branches that samples are left out of, by a mask or by not computing them.

As a subset, a branch f makes of x the same that a mask with equal scales makes of it,

    x + scale * f(x)  =  x + scale * place(f(take(x)))

where `take` picks the samples that are kept, and `place` puts them back where they were, with zeros in between. Each is
the other's gradient, and both are gathers, which fuse with what is around them; DINOv2's `layers/block.py` adds by
index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prelora_ray.config import DropPathForm
from prelora_ray.data.draws import Draw, generator
from prelora_ray.errors import UserError
from prelora_ray.method.architecture import blocks_of, residual_branches

_PARTS = 8
"""Counts are multiples of a cell's slots divided by this: each size wants memory and choices of kernels of its own, and
to leave out less than half of such a part costs more than it saves."""


class KeyedDropPath(nn.Module):
    """Stochastic depth whose masks are set from outside, for each sample, instead of drawn here."""

    count: int = 0
    """Samples of each cell that are kept; 0 where each is kept or not by chance."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale: torch.Tensor | None = None
        """(samples,): 0 where the branch is left out, else 1 / (1 - drop_prob); None leaves out nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.scale is None:
            return x
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class SubsetDropPath(KeyedDropPath):
    """Stochastic depth that has a branch computed for the samples that are kept: `count` of each `cell`.

    It ends the branch; `take` is a hook in front of the module that begins it.
    """

    def __init__(self, count: int, cell: int) -> None:
        super().__init__(1 - count / cell)
        self.count = count
        self.cell = cell

    def keep(self, order: torch.Tensor, place: torch.Tensor) -> None:
        """Sets what is kept besides `scale`: `order` (samples,) has the samples that are kept first, in ascending
        order, and `place` (samples,) for each sample its place among these, -1 where it is left out."""
        self.kept = order[: math.ceil(len(order) * self.count / self.cell)]  # of less than a cell, one at least
        self.place = place
        torch._dynamo.maybe_mark_dynamic(self.kept, 0)  # counts differ from block to block, and blocks share their code

    def take(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not self.training or self.scale is None:
            return inputs
        x, *others = inputs
        return _Take.apply(x, self.kept, self.place), *others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.scale is None:
            return x
        return super().forward(_Place.apply(x, self.kept, self.place))


class _Take(torch.autograd.Function):
    """x (samples, ...) to the samples that are kept, (kept, ...)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, kept)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = grads
        # A view of itself, which a compiler computes first: inside the gather it would read a norm's wider numbers.
        gradient = gradient.as_strided(gradient.shape, gradient.stride())
        return _placed(gradient, *ctx.saved_tensors), None, None


class _Place(torch.autograd.Function):
    """y (kept, ...) to (samples, ...), zero where a sample is left out."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, kept: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept)
        return _placed(y, place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return grads[0].index_select(0, kept), None, None


def _placed(y: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    is_kept = (place >= 0).view(-1, *[1] * (y.ndim - 1))
    return torch.where(is_kept, y.index_select(0, place.clamp(min=0)), 0)


def drop_uniformly(model: nn.Module, drop_prob: float) -> None:
    """Gives all blocks of a model the same probability of leaving out a residual branch.

    Raises ValueError where a block is not of timm's plain kind.
    """
    for block in blocks_of(model):
        for drop_path in residual_branches(block).values():
            setattr(block, drop_path, KeyedDropPath(drop_prob))


def use_form(model: nn.Module, form: DropPathForm, cell: int) -> str | None:
    """Gives a model whose drop paths are masks the form that is asked for; with `auto` that of subsets, where model and
    cell allow it.

    Returns why `auto` came to masks. Raises UserError as `compute_subsets` does, for the form subset alone.
    """
    if form == "mask":
        return None
    try:
        compute_subsets(model, cell)
    except UserError as error:
        if form == "subset":
            raise
        return str(error)
    return None


def compute_subsets(model: nn.Module, cell: int) -> None:
    """Has the blocks compute a residual branch only for the samples of each cell that are not left out of it.

    Blocks that leave out nothing stay as they are. Raises UserError, and changes nothing, where a block is not of the
    plain kind, and where a cell is too small for a share or a share too small for a cell.
    """
    blocks = [block for block in blocks_of(model) if drop_path_modules(block)]
    rates = [drop_path_modules(block)[0].drop_prob for block in blocks]
    counts = kept_counts(rates, cell)
    if rates and max(rates) > 0 and min(counts) == cell:
        raise UserError(
            f"model.drop_path = {max(rates):g} is not allowed with drop_path_form subset and data.cell = {cell}: no block "
            "would leave out any of so many images; it must be larger, or the form mask"
        )
    try:
        branches = [residual_branches(block) for block in blocks]
    except ValueError as error:
        raise UserError(f"model.drop_path_form = 'subset' is not allowed: {error}") from None
    for block, count, of_block in zip(blocks, counts, branches, strict=True):
        for first, drop_path in of_block.items():
            if count == cell:
                setattr(block, drop_path, nn.Identity())
                continue
            subset = SubsetDropPath(count, cell)
            setattr(block, drop_path, subset)
            # A bound method, through which compiled code that blocks share finds each block's own tensors.
            block.get_submodule(first).register_forward_pre_hook(subset.take)


def kept_counts(rates: Sequence[float], cell: int) -> list[int]:
    """How many samples of a cell each block keeps, given the share that it is to leave out.

    Counts are rounded to few sizes, and each block makes up for what those in front of it were off by, so that their
    mean is right. Raises UserError where a cell is too small for a share.
    """
    part = max(1, cell // _PARTS)
    if rates and cell * (1 - max(rates)) < part:
        raise UserError(
            f"model.drop_path = {max(rates):g} is not allowed with drop_path_form subset and data.cell = {cell}: of so many "
            f"images a block keeps at least {part}, so it must be at most {1 - part / cell:g}"
        )
    counts, owed = [], 0.0
    for rate in rates:
        wanted = cell * (1 - rate) + owed
        counts.append(min(cell, part * math.floor(wanted / part + 0.5)))
        owed = wanted - counts[-1]
    return counts


def drop_path_modules(model: nn.Module) -> list[KeyedDropPath]:
    return [module for module in model.modules() if isinstance(module, KeyedDropPath)]


def draw_drop_path(
    modules: Sequence[KeyedDropPath], seed: int, epoch: int, batch: int, cells: Sequence[int], size: int, num_slots: int
) -> torch.Tensor:
    """Scales for every module and slot, (modules, num_slots), drawn per cell of `size` slots.

    Where a module keeps a count of each cell's samples, it keeps as many of slots that belong to no cell.
    """
    keep = 1 - np.array([module.drop_prob for module in modules])[:, None]
    counts = np.array([module.count for module in modules])[:, None]
    scale = 1 / np.maximum(keep, np.finfo(float).tiny)
    scales = np.tile(np.where(counts > 0, (np.arange(size) < counts) * scale, 1.0), num_slots // size)
    for i, cell in enumerate(cells):
        draws = generator(seed, Draw.DROP_PATH, epoch, batch, cell).random((len(modules), size))
        ranks = draws.argsort(axis=1, kind="stable").argsort(axis=1)
        scales[:, i * size : (i + 1) * size] = np.where(counts > 0, ranks < counts, draws < keep) * scale
    return torch.from_numpy(scales)


def set_drop_path(modules: Sequence[KeyedDropPath], scales: torch.Tensor | None) -> None:
    """Sets the scales of the next micro-batch, (modules, samples) in whole cells; None leaves out nothing."""
    for i, module in enumerate(modules):
        module.scale = None if scales is None else scales[i]
    if scales is None or not any(isinstance(module, SubsetDropPath) for module in modules):
        return
    is_kept = scales > 0
    order = scales.argsort(dim=1, descending=True, stable=True)
    place = torch.where(is_kept, is_kept.cumsum(1) - 1, -1)
    for i, module in enumerate(modules):
        if isinstance(module, SubsetDropPath):
            module.keep(order[i], place[i])
