"""PreLoRA in Lightning's Trainer: phases, frozen weights, and its own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from prelora_ray.errors import UserError
from prelora_ray.integrations.lightning import PreLoRACallback, join
from prelora_ray.method.phases import Phase
from tests.integrations.loops import BATCH, EPOCHS, LATE, PHASES, STEPS, assert_same_bits, frozen, samples, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, logging and the like


class Module(lightning.LightningModule):
    def __init__(self, joins: bool = True, has_scheduler: bool = True) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.joins, self.has_scheduler = joins, has_scheduler
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.vit(images), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.vit(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        if self.joins:
            join(self, optimizer)
        if not self.has_scheduler:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Watch(lightning.Callback):
    """What is so after each epoch."""

    def __init__(self, prelora: PreLoRACallback) -> None:
        self.of = prelora
        self.phases: list[Phase] = []
        self.frozen: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.phases.append(self.of.prelora.phase)
        self.frozen.append(frozen(pl_module))


def batches(one_batch: bool = False) -> DataLoader:
    images, labels = samples()
    if one_batch:
        images, labels = images[:BATCH].repeat(STEPS, 1, 1, 1), labels[:BATCH].repeat(STEPS)
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH)


def fit(
    module: Module, *callbacks: Any, ckpt_path: Path | None = None, one_batch: bool = False, **options: Any
) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "max_epochs": EPOCHS, "enable_checkpointing": checkpointing} | quiet | options,
        callbacks=list(callbacks),
    )
    trainer.fit(module, batches(one_batch), batches(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_phases_come_and_what_is_frozen_stays(accumulate: int):
    module, callback = Module(), PreLoRACallback(**LATE)
    watch = Watch(callback)
    fit(module, callback, watch, accumulate_grad_batches=accumulate)
    assert watch.phases == PHASES
    assert not watch.frozen[0] and len(watch.frozen[1]) == 8 * len(module.vit.blocks)
    assert_same_bits(watch.frozen[1], watch.frozen[-1])
    first = callback.prelora.state_dict()["schedule"]["test"]["closed"][0]["loss"]
    assert first == pytest.approx(sum(module.losses[:STEPS]) / STEPS, rel=1e-6)


@pytest.mark.parametrize(
    "saved",
    [{}, {"save_on_train_epoch_end": False}, {"every_n_train_steps": STEPS}],
    ids=["by an epoch", "by a validation", "by a step"],
)
def test_a_fit_that_goes_on_from_a_checkpoint_has_the_same_bits(tmp_path: Path, saved: dict[str, Any]):
    undisturbed = Module()
    fit(undisturbed, PreLoRACallback(**LATE), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, **saved))
    expected = undisturbed.state_dict()
    for epoch in range(EPOCHS - 1):
        module, callback = Module(), PreLoRACallback(**LATE)
        fit(module, callback, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert callback.prelora.phase is Phase.LORA
        assert_same_bits(module.state_dict(), expected)


def test_a_fit_goes_on_from_the_middle_of_an_epoch(tmp_path: Path):
    """On batches that are all the same: Lightning goes on with the first one."""
    undisturbed, module = (Module(joins=False, has_scheduler=False) for _ in range(2))
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    fit(undisturbed, PreLoRACallback(**LATE), saving, one_batch=True)
    fit(module, PreLoRACallback(**LATE), ckpt_path=tmp_path / "step=4.ckpt", one_batch=True)
    assert_same_bits(module.state_dict(), undisturbed.state_dict())


def test_a_new_trainer_validates_a_checkpoint_of_phase_lora(tmp_path: Path):
    trainer = fit(Module(), PreLoRACallback(**LATE), ModelCheckpoint(tmp_path, filename="last"))
    module, callback = Module(), PreLoRACallback(**LATE)
    other = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    other.validate(module, batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert callback.prelora.phase is Phase.LORA
    assert_same_bits({n: t for n, t in module.state_dict().items() if n != "vit.prelora"},
                     {n: t for n, t in trainer.lightning_module.state_dict().items() if n != "vit.prelora"})  # fmt: skip


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match=r"strategy DDPStrategy is not allowed with PreLoRACallback: set devices=1"):
        PreLoRACallback(**LATE).setup(lightning.Trainer(accelerator="cpu", strategy="ddp", devices=1), Module(), "fit")
    with pytest.raises(UserError, match=r"does not know the adapters: call join\(self, optimizer\)"):
        fit(Module(joins=False), PreLoRACallback(**LATE))
    manual = Module()
    manual.automatic_optimization = False
    with pytest.raises(UserError, match="needs one optimizer, in automatic optimization"):
        fit(manual, PreLoRACallback(**LATE))
    fit(Module(), max_epochs=1)  # join without the callback
