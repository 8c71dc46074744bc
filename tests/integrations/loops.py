"""What the tests of the libraries' loops share: a tiny model, images, and when its phases begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from prelora_ray.method.phases import Phase
from tests.runs import TINY_VIT

EPOCHS, STEPS, BATCH = 4, 3, 8
LATE: dict[str, Any] = {
    "switch_epoch": 1,
    "warmup_epochs": 1,
    "window_epochs": 1,
    "windows": 4,
    "rank_pattern": {"query|fc1": 4, "key|value|proj|fc2": 2},
    "adapter_ramp_steps": 4,
}
PHASES = [Phase.WARMUP, Phase.LORA, Phase.LORA, Phase.LORA]
"""After each epoch."""


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=8, **TINY_VIT)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = STEPS * BATCH
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []
