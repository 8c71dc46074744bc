"""PreLoRA in an Accelerate loop: wrapped optimizers, and `save_state`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from prelora_ray import PreLoRA
from prelora_ray.integrations.carried import CarriedPreLoRA
from prelora_ray.method.phases import Phase
from tests.integrations.loops import BATCH, EPOCHS, LATE, PHASES, STEPS, assert_same_bits, frozen, samples, tiny_vit


class Loop:
    def __init__(self, of: type[PreLoRA] = CarriedPreLoRA, is_behind: bool = False, accumulate: int = 1) -> None:
        """`is_behind`: PreLoRA gets what Accelerate has wrapped."""
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = tiny_vit()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        if is_behind:
            model, optimizer = self.accelerator.prepare(model, optimizer)
        self.prelora = of(self.accelerator.unwrap_model(model), optimizer, **LATE)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.prelora.optimizer, EPOCHS * STEPS)
        if not is_behind:
            model, optimizer = self.accelerator.prepare(model, optimizer)
        data = DataLoader(TensorDataset(*samples()), batch_size=BATCH)
        self.model, self.optimizer = model, optimizer
        self.data, self.scheduler = self.accelerator.prepare(data, scheduler)

    def train_epoch(self) -> Phase:
        losses = []
        for images, labels in self.data:
            with self.accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(images), labels)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        self.prelora.end_epoch(sum(losses) / len(losses))
        return self.prelora.phase


@pytest.mark.parametrize("is_behind", [False, True], ids=["in front of prepare", "behind it"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_phases_come_and_what_is_frozen_stays(is_behind: bool, accumulate: int):
    loop = Loop(PreLoRA, is_behind, accumulate)
    phases = [loop.train_epoch(), loop.train_epoch()]
    held = frozen(loop.prelora.model)
    assert len(held) == 8 * len(loop.prelora.model.blocks)
    phases += [loop.train_epoch(), loop.train_epoch()]
    assert phases == PHASES
    assert_same_bits(frozen(loop.prelora.model), held)
    assert loop.prelora.state_dict()["adapter_steps"] == STEPS * (EPOCHS - 1) // accumulate


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_loop_that_loads_a_saved_state_has_the_same_bits(tmp_path: Path, done: int):
    undisturbed, first, second = Loop(), Loop(), Loop()
    for _ in range(EPOCHS):
        undisturbed.train_epoch()
    for _ in range(done):
        first.train_epoch()
    first.accelerator.save_state(str(tmp_path))
    second.accelerator.load_state(str(tmp_path))
    assert second.prelora.epoch == done and second.prelora.phase is first.prelora.phase
    for _ in range(EPOCHS - done):
        second.train_epoch()
    assert_same_bits(second.model.state_dict(), undisturbed.model.state_dict())
