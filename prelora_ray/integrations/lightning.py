"""PreLoRA as a callback of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from prelora_ray.errors import UserError
from prelora_ray.integrations.carried import CarriedPreLoRA, vit_of


class PreLoRACallback(Callback):
    """Takes a module's timm Vision Transformer through the phases: one device, one optimizer, which Lightning steps.

    Lightning restores callbacks after the weights, and the weights before there is an optimizer. So the state comes
    back with the weights, and the optimizer joins where fit starts, in front of its own state.
    """

    prelora: CarriedPreLoRA

    def __init__(self, vit: nn.Module | None = None, **options: Any) -> None:
        """`vit`: default, the one that the module holds when `fit` begins. `options`: as of PreLoRA."""
        self._vit, self._options = vit, options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            name = type(trainer.strategy).__name__
            raise UserError(f"strategy {name} is not allowed with PreLoRACallback: set devices=1 and strategy='auto'")
        if not hasattr(self, "prelora"):
            self.prelora = CarriedPreLoRA(vit_of(pl_module) if self._vit is None else self._vit, **self._options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise UserError("PreLoRACallback needs one optimizer, in automatic optimization")
        if self.prelora.optimizer is not trainer.optimizers[0]:
            if trainer.lr_scheduler_configs:
                raise UserError("the scheduler does not know the adapters: call join(self, optimizer) before you make it")
            self.prelora.join(trainer.optimizers[0])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # a fit that goes on from the last step of an epoch never sees that epoch end
            self.prelora.end()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if outputs:  # a step may be skipped
            self.prelora.add_loss(outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning has divided it

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.prelora.end()


def join(module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """For `configure_optimizers`, in front of a scheduler, which then sets the adapters' rate too.

    Does nothing where the trainer has no PreLoRACallback.
    """
    for callback in module.trainer.callbacks:
        if isinstance(callback, PreLoRACallback):
            callback.prelora.join(optimizer)
