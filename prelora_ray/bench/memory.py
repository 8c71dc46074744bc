"""Peak of a GPU's memory by phase: what freezing saves, over models, batches and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from prelora_ray.bench.machine import describe, free_memory, measure_rows, missing_fp8
from prelora_ray.bench.own import OwnRun, own_settings
from prelora_ray.config import Settings
from prelora_ray.engine.check import check_model
from prelora_ray.engine.precision import has_fp8
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
BATCHES = (256, 512)
MICRO_BATCHES = (64, 128, 256)
_STEPS = 5
"""Of which the fourth is captured as a CUDA graph: a replay allocates nothing."""


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...] = MODELS
    image_size: int = 224
    batches: tuple[int, ...] = BATCHES
    """Images in a step."""
    micro_batches: tuple[int, ...] = MICRO_BATCHES
    """Images taken through the model at once; those that divide a batch."""
    residual: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Row:
    name: str
    model: str
    batch: int
    micro_batch: int
    accumulation: int
    """Micro-batches in a step, whose gradients add up."""
    phase: str
    peak_gib: float | None
    """Most memory allocated in steps of the phase; None where the GPU has not so much."""
    against_full: float | None
    """As a share of full training's with the same batch and micro-batch."""


def bench_memory(options: Options) -> dict[str, Any]:
    """Measures every row, one after the other; `rows` and what they ran on, as JSON can hold it.

    `failed` says what ended it before its last row, or is None. Raises UserError without a GPU, for a model that cannot
    work, and where no micro-batch divides any batch.
    """
    if not torch.cuda.is_available():
        raise UserError("prelora bench memory needs a GPU, and there is none: a CPU's allocator tells of no peak")
    sizes = split_batches(options)
    for model in options.models:
        check_model(_settings(options, model, sizes[0], "auto"))
    device = torch.device("cuda")
    content = {"options": vars(options), **measure_rows(_rows(options, sizes, device), _told)}
    return {"benchmark": "memory", **describe(device), **content, "missing": missing_fp8(device, "lora fp8")}


def _told(row: Row) -> str:
    return "does not fit" if row.peak_gib is None else f"{row.peak_gib:.1f} GiB"


def split_batches(options: Options) -> list[tuple[int, int]]:
    """(batch, micro-batch) of every whole split."""
    sizes = [(batch, micro) for batch in options.batches for micro in options.micro_batches if batch % micro == 0]
    if not sizes:
        raise UserError(
            f"--micro-batch {options.micro_batches[0]} is not allowed with --batch {options.batches[0]}: it must divide it"
        )
    return sizes


def _settings(options: Options, model: str, sizes: tuple[int, int], precision: Literal["auto", "fp8"]) -> Settings:
    batch, micro_batch = sizes
    train = {"precision": precision, "residual": options.residual, "micro_batch": micro_batch}
    return own_settings({"name": model, "image_size": options.image_size}, batch, micro_batch, train)


def _rows(options: Options, sizes: list[tuple[int, int]], device: torch.device) -> Iterator[Row]:
    for model in options.models:
        for batch, micro_batch in sizes:
            peaks = {}
            for phase, peak in _peaks(options, model, (batch, micro_batch), device):
                peaks[phase] = peak
                full = peaks["full"]
                yield Row(
                    f"{model}, {batch} in {batch // micro_batch}, {phase}",
                    model,
                    batch,
                    micro_batch,
                    batch // micro_batch,
                    phase,
                    None if peak is None else peak / 2**30,
                    None if peak is None or full is None else peak / full,
                )


def _peaks(options: Options, model: str, sizes: tuple[int, int], device: torch.device) -> Iterator[tuple[str, int | None]]:
    """Name and bytes of each phase; None where it does not fit."""
    run = OwnRun(_settings(options, model, sizes, "auto"), device)
    for phase in Phase:
        run.enter(phase)
        yield phase.value, _peak(run)
    del run
    if has_fp8(device):
        free_memory(device)
        run = OwnRun(_settings(options, model, sizes, "fp8"), device)
        run.enter(Phase.WARMUP)
        run.enter(Phase.LORA)
        yield "lora fp8", _peak(run)


def _peak(run: OwnRun) -> int | None:
    try:
        for _ in range(_STEPS):
            run.step()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(run.state.device)
