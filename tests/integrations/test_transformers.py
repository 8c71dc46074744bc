"""PreLoRA in Hugging Face's Trainer: phases, frozen weights, and its own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from prelora_ray.engine.prelora import PreLoRA
from prelora_ray.errors import UserError
from prelora_ray.integrations.transformers import PreLoRACallback
from prelora_ray.method.adapters import base_state_dict
from prelora_ray.method.phases import Phase
from tests.integrations.loops import BATCH, EPOCHS, LATE, PHASES, STEPS, assert_same_bits, frozen, samples, tiny_vit


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.losses: list[float] = []

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.vit(pixel_values)
        loss = F.cross_entropy(logits, labels)
        if self.training:
            self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


class Watch(TrainerCallback):
    """What is so when an epoch has ended."""

    def __init__(self, of: PreLoRACallback) -> None:
        self.of = of
        self.phases: list[Phase] = []
        self.frozen: list[dict[str, torch.Tensor]] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phases.append(self.of.prelora.phase)
        self.frozen.append(frozen(self.of.prelora.model))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    basic = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2, "weight_decay": 0.1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **basic | quiet | options)


TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64},
    **{"image_size": 8, "patch_size": 2, "num_labels": 10},
}


def vit_of_transformers() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES)).eval()


class Wrapper(PreTrainedModel):
    """A model of transformers' kind around a timm ViT."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.vit = tiny_vit()


def trainer_of(folder: Path, model: nn.Module | None = None, **options: Any) -> tuple[Trainer, PreLoRACallback]:
    images, labels = samples()
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    model = Model() if model is None else model
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data, eval_dataset=data)
    callback = PreLoRACallback(trainer, **LATE)
    trainer.add_callback(callback)
    return trainer, callback


@pytest.mark.parametrize("logging", [{}, {"logging_steps": 2}, {"logging_strategy": "epoch", "eval_strategy": "epoch"}])
def test_phases_come_and_what_is_frozen_stays(tmp_path: Path, logging: dict[str, Any]):
    trainer, callback = trainer_of(tmp_path, **logging)
    watch = Watch(callback)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.phases == PHASES
    assert not watch.frozen[0] and len(watch.frozen[1]) == 8 * len(trainer.model.vit.blocks)
    assert_same_bits(watch.frozen[1], watch.frozen[-1])
    first = callback.prelora.state_dict()["schedule"]["test"]["closed"][0]["loss"]
    assert first == pytest.approx(sum(trainer.model.losses[:STEPS]) / STEPS, rel=1e-6)


def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_bits(tmp_path: Path):
    undisturbed, _ = trainer_of(tmp_path, save_strategy="steps", save_steps=1)
    undisturbed.train()
    expected = undisturbed.model.state_dict()
    for step in (3, 4, 9):  # the end of an epoch, in the middle of one, phase lora
        trainer, callback = trainer_of(tmp_path / "other")
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert callback.prelora.phase is Phase.LORA
        assert_same_bits(trainer.model.state_dict(), expected)


def test_a_vit_of_transformers_is_trained_as_it_is(tmp_path: Path):
    """Resumed it has the same bits. PEFT and transformers compute the same of what comes out."""
    undisturbed, callback = trainer_of(tmp_path, vit_of_transformers(), save_strategy="steps", save_steps=1)
    watch = Watch(callback)
    undisturbed.add_callback(watch)
    undisturbed.train()
    assert watch.phases == PHASES
    assert not watch.frozen[0] and len(watch.frozen[1]) == 12 * 3  # six weights and biases of each block
    assert_same_bits(watch.frozen[1], watch.frozen[-1])
    resumed, _ = trainer_of(tmp_path / "other", vit_of_transformers())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert_same_bits(resumed.model.state_dict(), undisturbed.model.state_dict())
    images, trained = samples()[0], undisturbed.model.eval()
    with torch.no_grad():
        expected = trained(pixel_values=images).logits
        plain = vit_of_transformers()
        assert (plain(pixel_values=images).logits - expected).abs().max() > 0.1
        plain.load_state_dict(callback.prelora.merged_state_dict())
        torch.testing.assert_close(plain(pixel_values=images).logits, expected, rtol=0, atol=1e-5)
        callback.prelora.save_adapter(tmp_path / "adapter")
        base = vit_of_transformers()
        told = base.load_state_dict(base_state_dict(trained), strict=False)
        assert (told.missing_keys, told.unexpected_keys) == ([], ["prelora"])
        by_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(by_peft(pixel_values=images).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (ViTForImageClassification(ViTConfig(**SIZES)), ["classifier"]),
        (DeiTForImageClassification(DeiTConfig(**SIZES)), ["classifier"]),
        (DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES)), ["cls_classifier", "distillation_classifier"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_but_the_heads_freezes(model: nn.Module, heads: list[str]):
    prelora = PreLoRA(model, freeze="all_but_head", **LATE)
    prelora.end_epoch(1.0)
    prelora.end_epoch(1.0)
    assert len(prelora.ranks or {}) == 18
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert trains == [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]


def test_of_a_wrapper_the_timm_vit_is_adapted(tmp_path: Path):
    wrapper = Wrapper()
    callback = PreLoRACallback(Trainer(wrapper, arguments(tmp_path), train_dataset=[1]), **LATE)
    assert callback.prelora.model is wrapper.vit
    with pytest.raises(UserError, match="BertModel has no blocks that PreLoRA knows"):
        PreLoRACallback(Trainer(BertModel(BertConfig(**TINY_BERT)), arguments(tmp_path), train_dataset=[1]), **LATE)


def test_a_model_that_is_no_timm_vit_is_named(tmp_path: Path):
    def callback(**named: Any) -> PreLoRACallback:
        return PreLoRACallback(Trainer(swin, arguments(tmp_path), train_dataset=[1]), **named, **LATE)

    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=(1, 1, 1, 1))
    with pytest.raises(UserError, match="SwinTransformer holds 0 timm Vision Transformers: name the model to adapt as vit="):
        callback()
    assert len(callback(vit=swin).prelora.targets) == 4 * 6


def test_what_cannot_be_is_told(tmp_path: Path):
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    with pytest.raises(UserError, match="load_best_model_at_end is not allowed with PreLoRACallback"):
        trainer_of(tmp_path, **best)
    with pytest.raises(UserError, match="needs a train_dataset with a length"):
        PreLoRACallback(Trainer(Model(), arguments(tmp_path)))
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(UserError, match="a scheduler of your own is not allowed"):
        PreLoRACallback(Trainer(model, arguments(tmp_path), train_dataset=[1], optimizers=(optimizer, scheduler)))
