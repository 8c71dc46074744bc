"""Two workers that would decide differently by themselves decide as rank 0 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prelora_ray import PreLoRA
from prelora_ray.config import ModelSettings
from prelora_ray.engine.model import create_model
from prelora_ray.method.phases import Phase
from tests.engine.test_exchange import join, start
from tests.runs import TINY_VIT


def decide_beside_another(rank: int, folder: Path, differs: int, switches: bool) -> None:
    """On one worker weights change by their last bit, which its own test would take for more than tau."""
    join(rank, folder)
    settings = ModelSettings(name="vit_tiny_patch16_224", image_size=8, options=TINY_VIT)
    model = create_model(settings, num_classes=10, seed=0)
    prelora = PreLoRA(model, tau=1e-9, zeta=1e9, windows=2, window_epochs=1, r_min=2, r_max=4)
    assert not prelora.end_epoch(1.0).begins_phase
    if rank == differs:
        weight = model.blocks[0].mlp.fc1.weight.data
        weight.copy_(torch.nextafter(weight, 2 * weight))
    assert prelora.end_epoch(1.0 + rank * 1e-12).begins_phase == switches
    assert prelora.phase is (Phase.WARMUP if switches else Phase.FULL)
    adapters = {name: tensor.tolist() for name, tensor in model.state_dict().items() if ".lora_" in name}
    assert bool(adapters) == (prelora.ranks is not None) == switches
    found: list[Any] = [None, None]
    dist.all_gather_object(found, (prelora.state_dict(), adapters))
    assert found[0] == found[1]


@pytest.mark.parametrize(("differs", "switches"), [(1, True), (0, False)])
def test_the_decision_of_rank_0_holds(tmp_path, differs, switches):
    start(decide_beside_another, tmp_path, differs, switches)
