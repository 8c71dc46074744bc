"""PreLoRA in Lightning's Trainer. Run: python examples/with_lightning.py"""

from typing import Any

import torch
from digits import EPOCHS, METHOD, digits, small_vit
from lightning import pytorch as lightning
from torch.nn import functional as F
from torch.utils.data import DataLoader

from prelora_ray.integrations.lightning import PreLoRACallback, join


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vit = small_vit()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.vit(images), labels)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)
        join(self, optimizer)  # in front of the scheduler, which then sets the adapters' rate too
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Report(lightning.Callback):
    def __init__(self, of: PreLoRACallback) -> None:
        self.of = of

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.phase = self.of.prelora.phase

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        loss = trainer.callback_metrics["loss"]
        print(f"epoch {trainer.current_epoch + 1}: phase {self.phase}, loss {loss:.3f}")


def main() -> None:
    callback = PreLoRACallback(**METHOD)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=EPOCHS, devices=1, callbacks=[callback, Report(callback)], **quiet)
    trainer.fit(Digits(), DataLoader(digits()[0], batch_size=50, shuffle=True))


if __name__ == "__main__":
    main()
