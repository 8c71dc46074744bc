"""PreLoRA in Hugging Face's Trainer. Run: python examples/with_trainer.py"""

import tempfile
from typing import Any

import torch
from digits import EPOCHS, METHOD, digits, small_vit
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from prelora_ray.integrations.transformers import PreLoRACallback


class Classifier(nn.Module):
    """A timm model in the form that Trainer takes: it gets the labels, and returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = small_vit()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.vit(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Report(TrainerCallback):
    def __init__(self, of: PreLoRACallback) -> None:
        self.of = of

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phase = self.of.prelora.phase

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = state.log_history[-1]["loss"]
        print(f"epoch {state.epoch:.0f}: phase {self.phase}, loss {loss:.3f}")


def main() -> None:
    data = [{"pixel_values": image, "labels": label} for image, label in digits()[0]]
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "epoch"}
        schedule = {"num_train_epochs": EPOCHS, "learning_rate": 2e-3, "weight_decay": 0.05}
        args = TrainingArguments(folder, per_device_train_batch_size=50, use_cpu=True, **schedule, **quiet)
        trainer = Trainer(Classifier(), args, train_dataset=data)
        callback = PreLoRACallback(trainer, **METHOD)
        trainer.add_callback(callback)
        trainer.add_callback(Report(callback))
        trainer.train()


if __name__ == "__main__":
    main()
