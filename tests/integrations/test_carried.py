"""The state of PreLoRA inside the model's own, without a library."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from prelora_ray.errors import UserError
from prelora_ray.integrations.carried import CarriedPreLoRA, vit_of
from prelora_ray.method.phases import Phase
from tests.integrations.loops import LATE, assert_same_bits, tiny_vit
from tests.runs import TINY_VIT


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.optimizer = torch.optim.AdamW(self.vit.parameters(), lr=1e-2)
        self.prelora = CarriedPreLoRA(self.vit, self.optimizer, **LATE)


def after(*losses: float) -> Model:
    """A model at the end of epochs of these losses."""
    model = Model()
    for loss in losses:
        model.prelora.add_loss(loss)
        model.prelora.end()
    return model


@pytest.mark.parametrize("losses", [(2.0,), (2.0, 1.0)], ids=["warmup", "lora"])
def test_it_comes_back_with_the_weights(losses: tuple[float, ...]):
    first, second = after(*losses), Model()
    first.prelora.add_loss(torch.tensor(0.5), steps=3)
    second.load_state_dict(first.state_dict())  # strict
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert second.prelora.state_dict() == first.prelora.state_dict()
    assert second.prelora.phase is first.prelora.phase is not Phase.FULL
    assert_same_bits(second.state_dict(), first.state_dict())


def test_the_mean_counts_steps_in_float32():
    model = Model()
    model.prelora.end()
    assert model.prelora.epoch == 0  # none without a loss
    model.prelora.add_loss(torch.tensor(1.0, dtype=torch.bfloat16, requires_grad=True))
    model.prelora.add_loss(torch.tensor(1.0 / 512, dtype=torch.bfloat16))
    model.prelora.add_loss(4.0, steps=2)
    model.prelora.end()
    assert model.prelora.epoch == 1
    assert model.prelora.state_dict()["schedule"]["test"]["closed"][0]["loss"] == (9 + 1 / 512) / 4


def test_a_copy_carries_nothing_and_timm_loads_what_comes_out():
    model = after(2.0, 1.0)
    average = copy.deepcopy(model.vit)
    assert "prelora" in model.vit.state_dict() and "prelora" not in average.state_dict()
    average.load_state_dict(model.vit.state_dict())
    merged = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=8, **TINY_VIT)
    merged.load_state_dict(model.prelora.merged_state_dict())


def test_a_later_load_takes_weights_of_the_same_adapters_alone():
    model, earlier = after(2.0, 1.0), after(3.0)
    with torch.no_grad():
        earlier.vit.norm.weight.fill_(7.0)
    model.load_state_dict(earlier.state_dict())
    assert model.prelora.phase is Phase.LORA and model.prelora.epoch == 2
    assert model.vit.norm.weight[0] == 7.0
    with pytest.raises(UserError, match="a checkpoint of phase full is not allowed in a model of phase lora"):
        model.load_state_dict(Model().state_dict(), strict=False)


def test_the_vit_is_found_or_named():
    model = Model()
    assert vit_of(model) is vit_of(model.vit) is model.vit
    with pytest.raises(UserError, match="Linear holds 0 timm Vision Transformers: name the model to adapt as vit="):
        vit_of(nn.Linear(2, 2))
    with pytest.raises(UserError, match="ModuleList holds 2 timm Vision Transformers"):
        vit_of(nn.ModuleList([tiny_vit(), tiny_vit()]))
