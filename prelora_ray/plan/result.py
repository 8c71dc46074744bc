"""What a plan says."""

from __future__ import annotations

from dataclasses import dataclass

from prelora_ray.method.phases import Phase


@dataclass(frozen=True)
class PhasePlan:
    """One kind of step, on each GPU."""

    phase: Phase
    image_size: int
    format: str
    """Of the products."""
    images_per_second: float
    """Over an epoch: its last batch takes as long as the others, however few its images."""
    measured_images_per_second: float | None
    """Of the run that the plan is of; None where it is of a recipe, or the run had no such step."""
    step_ms: float
    waiting_ms: float
    """Part of `step_ms` in which gradients are exchanged and nothing is computed."""
    exchanged_bytes: int
    """Gradients, a step."""
    trainable_parameters: int
    parameters: int
    micro_batch: int
    """Images at once."""
    memory_gib: float | None
    """Peak with so many at once; None where the benchmark ran on a CPU."""
    largest_micro_batch: int | None
    """Most images at once that fit beside a checkpoint's snapshot; None where the GPU's memory is not known."""
    least_gib: float | None
    """Memory of the smallest GPU that a cell at once and a snapshot fit on; None where the benchmark ran on a CPU."""
    fits: bool | None
    epoch_gpu_hours: float
    measured_batch: int
    """Images at once in the row that the speed rests on."""
    is_estimated: bool
    """Whether another model or image size was measured, and taken over by operations."""
    source: str
    """Of speed and memory: `measured`, or what they are estimated from."""


@dataclass(frozen=True)
class RunPlan:
    """A run from its first epoch to its last."""

    name: str
    switch_epoch: int | None
    epochs: dict[Phase, int]
    gpu_hours: dict[Phase, float]
    hours: dict[Phase, float]
    """By the clock."""
    total_gpu_hours: float
    total_hours: float
    of_full: float
    """GPU-hours over those of full training."""
    of_timm: float | None
    """Over those of timm's eager full training, at `model.image_size` throughout; None where no file has it."""
    full_epochs: float
    """The control: epochs of full training that cost as much, its schedule ended there."""


@dataclass(frozen=True)
class Plan:
    name: str
    model: str
    epochs: int
    images: int
    batch_size: int
    gpus: int
    gpu: str
    memory_gib: float | None
    """Of a GPU; None where it is not known."""
    bandwidth_gbit: float | None
    phases: list[PhasePlan]
    runs: list[RunPlan]
    """Full training first, then by switch epoch, and timm's last where it was measured."""
    break_even_epoch: int | None
    """The last switch epoch that costs less than full training; None where there is none."""
    gpu_hours_by_switch: list[float]
    """Of runs that switch after 1, 2, ... epochs; empty for a recipe that never switches."""
    notes: list[str]
    """What is assumed, and what is not counted."""
