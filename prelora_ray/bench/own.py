"""A run of our own without its data: the steps that a benchmark calls, over one batch in memory."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch

from prelora_ray.bench.machine import free_memory
from prelora_ray.config import DataSettings, Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch
from prelora_ray.data.manifest import Manifest, Shard
from prelora_ray.engine.exchange import Exchange
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.method.architecture import blocks_of
from prelora_ray.method.phases import Phase
from prelora_ray.train.batch_stream import stream_plan

NUM_CLASSES = 1000
RANKS = (8, 16, 32, 32, 32, 64, 64, 8, 32, 32)
"""Dealt out to the modules: 8 to 64, mean 32."""


class OwnRun:
    """One worker's part of a run that begins in phase full. Adapters go on all blocks but the first share of them."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        exchange: Exchange | None = None,
        first_share: float = 0.0,
    ) -> None:
        shard = Shard("none", (settings.data.batch_size,), 0, "")
        manifest = Manifest(tuple(map(str, range(NUM_CLASSES))), {"train": (shard,), "val": (shard,)}, 0, {})
        plan = stream_plan(settings, manifest, rank, world_size)
        self.state = TrainState(settings, NUM_CLASSES, 10**6, device, world_size, exchange=exchange)
        self._train_step = TrainStep(self.state, plan)
        size, slots = settings.model.image_size, plan.num_slots
        images, labels = torch.randint(256, (slots, size, size, 3), dtype=torch.uint8), torch.randint(NUM_CLASSES, (slots,))
        self._batch = Batch("train", 0, 0, {"images": images, "labels": labels}, np.arange(slots))
        first = first_share * len(blocks_of(self.state.model))
        self._ranks = _deal_ranks([target.name for target in self.state.targets if target.layer >= first])

    def step(self) -> None:
        """One optimizer step, on the same images each time."""
        self._train_step.train(self._batch)

    def enter(self, phase: Phase) -> None:
        """Goes on in this phase or a later one; the peak of memory is counted anew."""
        self.state.enter(phase, self._ranks)
        free_memory(self.state.device)


def own_settings(
    model: dict[str, Any], batch_size: int, at_once: int, train: dict[str, Any], method: dict[str, Any] | None = None
) -> Settings:
    """Of a run whose workers take `at_once` images through the model; cells are of the default size, or divide that."""
    return parse_settings(
        {
            "name": "bench",
            "data": {"path": "none", "batch_size": batch_size, "cell": math.gcd(at_once, DataSettings(path="none").cell)},
            "model": model,
            "train": train,
            "method": method or {},
        }
    )


def _deal_ranks(names: list[str]) -> dict[str, int]:
    dealt = [RANKS[i % len(RANKS)] for i in range(len(names))]
    random.Random(0).shuffle(dealt)
    return dict(zip(names, dealt, strict=True))
