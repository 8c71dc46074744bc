"""Operations that a model asks of a GPU, and the most that a GPU does of them."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from prelora_ray.config import ModelSettings
from prelora_ray.data.token_rows import masked_tokens
from prelora_ray.engine.drop_path import drop_path_modules, set_drop_path, use_form
from prelora_ray.engine.model import create_model, example_inputs
from prelora_ray.method.phases import Phase

_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "V100": 125e12,
}
"""Dense bf16 products (V100: fp16) by the vendor's data sheets, operations a second."""


def peak_flops(name: str) -> float | None:
    """Peak rate of bf16 products of a GPU of this name, as the driver tells it; None where it is not known."""
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)


def forward_flops(
    settings: ModelSettings,
    num_classes: int,
    image_size: int | None = None,
    cell: int | None = None,
    sequence_length: int | None = None,
) -> float:
    """Operations of one sample's forward through the model without adapters; by default of an image of
    `model.image_size`, or of a sequence of the model's full length.

    With `cell`, slots in a cell, it is one in training, without what drop path as a subset does not compute.
    """
    size = image_size or settings.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = create_model(settings, num_classes, seed=0, any_size=size != settings.image_size)
        images = 1
        if cell is not None and settings.drop_path_form != "mask":
            images = cell
            use_form(model, settings.drop_path_form, cell)
            modules = drop_path_modules(model)
            set_drop_path(modules, torch.ones(len(modules), cell))
        resized = settings.model_copy(update={"image_size": size})
        inputs = example_inputs(resized, model, images, torch.float32)
        if settings.takes_text:
            inputs = inputs[:, :sequence_length]
        masked = (torch.zeros(images, masked_tokens(inputs.shape[1]), dtype=torch.long),) if settings.takes_text else ()
        model.train()(inputs, *masked)
    return float(counter.get_total_flops()) / images


def training_passes(phase: Phase) -> int:
    """How many forwards' worth of operations training takes: the backward is two, and one where the base is frozen."""
    return 2 if phase is Phase.LORA else 3
