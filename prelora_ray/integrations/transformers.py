"""PreLoRA as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prelora_ray.errors import UserError
from prelora_ray.integrations.carried import CarriedPreLoRA, vit_of


class PreLoRACallback(TrainerCallback):
    """Takes a trainer's model through the phases, on one device: a ViT of transformers, or the timm ViT inside it.

        trainer = Trainer(model, args, train_dataset=images)
        trainer.add_callback(PreLoRACallback(trainer, tau=0.5))
        trainer.train()

    Trainer loads the weights and then the optimizer's state before it calls any callback. So the optimizer is made
    here, and the state comes back with the weights. The training loss of an epoch is Trainer's own: at its last step
    Trainer logs, and before it saves.
    """

    def __init__(self, trainer: Trainer, vit: nn.Module | None = None, **options: Any) -> None:
        """`vit`: default, the timm ViT that the model holds, or the model itself where it is one of transformers.
        `options`: as of PreLoRA."""
        args = trainer.args
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(f"{max(args.world_size, args.n_gpu)} devices are not allowed with PreLoRACallback: use one")
        if args.load_best_model_at_end:
            raise UserError("load_best_model_at_end is not allowed with PreLoRACallback: the best may be of another phase")
        if not hasattr(trainer.train_dataset, "__len__"):
            raise UserError("PreLoRACallback needs a train_dataset with a length, or there are no epochs")
        if trainer.lr_scheduler is not None:
            raise UserError("a scheduler of your own is not allowed with PreLoRACallback: set args.lr_scheduler_type")
        if is_of_transformers := isinstance(trainer.model, PreTrainedModel):
            # Else Trainer saves tensors under names that it does not know when it resumes (transformers #48805).
            trainer.model._weight_conversions = []
        if vit is None:
            vit = vit_of(trainer.model, or_itself=is_of_transformers)
        self.prelora = CarriedPreLoRA(vit, trainer.create_optimizer(), **options)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._logged_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._is_epoch_end = state.epoch % 1 == 0
        control.should_log |= self._is_epoch_end or control.should_save

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:  # of an evaluation
            return
        self.prelora.add_loss(logs["loss"], state.global_step - self._logged_step)
        self._logged_step = state.global_step
        if self._is_epoch_end:
            self.prelora.end()
