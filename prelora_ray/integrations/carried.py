"""PreLoRA for a loop whose checkpoints a library writes: its state travels in the model's own."""

from __future__ import annotations

import json
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn

from prelora_ray.engine.prelora import PreLoRA
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase

_NAME = "prelora"


class CarriedPreLoRA(PreLoRA):
    """A PreLoRA whose state is one more tensor, `prelora`, of the model's `state_dict`, as UTF-8 of JSON.

    So every checkpoint of the model holds it. Where a new model loads such a checkpoint, its adapters are put in place
    before the weights are copied, and its optimizer is handed over before the optimizer's own state is loaded.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> None:
        """Arguments as of PreLoRA."""
        super().__init__(model, optimizer, **options)
        self._loss_sum: torch.Tensor | float = 0.0
        self._steps = 0
        model.register_state_dict_post_hook(lambda module, tensors, prefix, _: self._leave(module, tensors, prefix))
        model.register_load_state_dict_pre_hook(lambda module, tensors, prefix, *_: self._return(module, tensors, prefix))

    def add_loss(self, loss: torch.Tensor | float, steps: int = 1) -> None:
        """Counts the mean training loss of `steps` steps of an epoch."""
        if isinstance(loss, torch.Tensor):
            loss = loss.detach().float()
        self._loss_sum = self._loss_sum + loss * steps
        self._steps += steps

    def end(self) -> None:
        """Ends the epoch, with the mean of what `add_loss` has counted in it; without that there was none."""
        if self._steps:
            loss = float(self._loss_sum) / self._steps
            self._loss_sum, self._steps = 0.0, 0
            self.end_epoch(loss)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "loss_sum": float(self._loss_sum), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._loss_sum, self._steps = state["loss_sum"], state["steps"]

    def merged_state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in super().merged_state_dict().items() if name != _NAME}

    def _leave(self, module: nn.Module, tensors: dict[str, Any], prefix: str) -> None:
        if module is self.model:  # and no copy of it
            tensors[prefix + _NAME] = torch.tensor(list(json.dumps(self.state_dict()).encode()), dtype=torch.uint8)

    def _return(self, module: nn.Module, tensors: dict[str, Any], prefix: str) -> None:
        carried = tensors.pop(prefix + _NAME, None)
        if carried is None or module is not self.model:
            return
        state = json.loads(bytes(carried.tolist()))
        if self.phase is Phase.FULL:
            self.load_state_dict(state)
        elif state["schedule"]["ranks"] != self.ranks:
            raise UserError(
                f"a checkpoint of phase {state['schedule']['phase']} is not allowed in a model of phase {self.phase} "
                "with other adapters: load it into a new model"
            )


def vit_of(model: nn.Module, *, or_itself: bool = False) -> nn.Module:
    """The timm Vision Transformer inside a model; with `or_itself` the model, where it holds none.

    Raises UserError where there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, VisionTransformer)]
    if or_itself and not found:
        return model
    if len(found) != 1:
        raise UserError(f"{type(model).__name__} holds {len(found)} timm Vision Transformers: name the model to adapt as vit=")
    return found[0]
