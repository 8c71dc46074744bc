"""A run at one moment, in memory: what a checkpoint is written from, and read into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prelora_ray.engine.optim import OptimizerState

Tensors = dict[str, torch.Tensor]


@dataclass
class Snapshot:
    """All that a run needs to go on."""

    state: dict[str, Any]
    """JSON: "epoch" and "batch" (the position), and what the training state adds; "fork": whether the change of phase
    that "phases" tells of is still to come, as in the checkpoint of a trunk that a fork begins with."""
    model: Tensors
    """The model's own tensors, by timm's names, less those in `base`."""
    optimizer: OptimizerState
    base: Tensors = field(default_factory=dict)
    """Frozen tensors; empty too where the run folder holds them already."""
    refers_to_base: bool = False
    """Whether the checkpoint is whole only with the frozen tensors."""
    adapter: Tensors = field(default_factory=dict)
    """Adapters in PEFT's names."""
    adapter_config: dict[str, Any] | None = None
    ema: Tensors = field(default_factory=dict)
    """Averaged weights, merged, by timm's names; empty where the run averages none."""
    score: float | None = None
    """How good the epoch is that it ends, the higher the better: top-1, or what else runs of the task are compared by.
    None where it ends none that was validated."""

    @property
    def name(self) -> str:
        return checkpoint_name(self.state["epoch"], self.state["batch"])

    def with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Snapshot:
        """The same with each tensor as `change` returns it, which is called in an order that the names alone decide."""

        def changed(tensors: Tensors) -> Tensors:
            return {name: change(tensors[name]) for name in sorted(tensors)}

        return replace(
            self,
            model=changed(self.model),
            optimizer={name: changed(self.optimizer[name]) for name in sorted(self.optimizer)},
            base=changed(self.base),
            adapter=changed(self.adapter),
            ema=changed(self.ema),
        )


def checkpoint_name(epoch: int, batch: int) -> str:
    return f"{epoch:05d}-{batch:06d}"


def epoch_of(name: str) -> int:
    """Completed epochs of the checkpoint of a name."""
    return int(name.split("-")[0])
