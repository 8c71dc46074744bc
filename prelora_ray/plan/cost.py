"""What a step, an epoch and a run cost: plain arithmetic over a speed that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prelora_ray.engine.micro_batch import SPARE_SHARE
from prelora_ray.engine.precision import Format
from prelora_ray.method.phases import Phase

BACKWARD_SHARE = 0.57
"""Part of a step's computing beside which gradients are exchanged: fitted to steps over slow links, docs/plan.md."""
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
"""Bytes of gradients that DDP exchanges at once: the first ones to be ready, and all others."""


@dataclass(frozen=True)
class Workload:
    """What a step computes, which its speed and its memory follow from."""

    phase: Phase
    image_size: int
    """Side of a training image, in pixels."""
    format: Format
    """Of the products."""


@dataclass(frozen=True)
class Step:
    """A step of all GPUs together; each computes as many slots for images as the one with most, filled or empty."""

    compute_seconds: float
    waiting_seconds: float
    """For the exchange of gradients, once nothing is left to compute beside it."""

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.waiting_seconds


@dataclass(frozen=True)
class Memory:
    """What a step keeps on a GPU."""

    trainable: int
    """Parameters that train."""
    parameters: int
    """All of them."""
    bytes_per_image: float
    """Of a forward, kept for its backward."""
    averaged: int = 0
    """Parameters of which an average is kept (`train.ema`)."""

    def peak(self, images: int) -> float:
        """Bytes of a step with so many images at once."""
        return self.state + images * self.bytes_per_image

    @property
    def state(self) -> int:
        """Bytes that do not grow with the images, on every GPU, however many there are."""
        return state_bytes(self.trainable, self.parameters) + 4 * self.averaged

    @property
    def snapshot(self) -> int:
        """Bytes of a checkpoint's copy of all but gradients."""
        return 4 * self.parameters + 8 * self.trainable + 4 * self.averaged

    def needs(self, images: int) -> float:
        """Bytes of a GPU of which a step with so many images at once and a snapshot leave the spare share free."""
        return (self.peak(images) + self.snapshot) / (1 - SPARE_SHARE)


def state_bytes(trainable: int, parameters: int) -> int:
    """What does not grow with the images: weights and, of what trains, gradients and Adam's two moments, in float32."""
    return 4 * parameters + 12 * trainable


def ring_seconds_per_byte(gpus: int, bandwidth: float) -> float:
    """Of an all-reduce over a ring: each GPU sends all bytes but its own share twice. `bandwidth`: bytes a second."""
    return 2 * (gpus - 1) / gpus / bandwidth


def waiting_seconds(gradient_bytes: int, seconds_per_byte: float, backward_seconds: float) -> float:
    """How much longer than the backward the exchange of its gradients takes.

    Gradients become ready evenly over the backward; DDP exchanges them in buckets, one by one, each once it is full.
    """
    ready = end = 0.0
    filled, size = 0, _FIRST_BUCKET
    while filled < gradient_bytes:
        size = min(size, gradient_bytes - filled)
        filled += size
        ready = backward_seconds * filled / gradient_bytes
        end = max(end, ready) + size * seconds_per_byte
        size = _BUCKET
    return max(0.0, end - backward_seconds)


def phase_spans(epochs: int, switch_epoch: int | None, warmup_epochs: int) -> dict[Phase, range]:
    """The epochs of each phase; a run without a switch has full ones alone."""
    switch = epochs if switch_epoch is None else switch_epoch
    freeze = min(switch + warmup_epochs, epochs)
    return {Phase.FULL: range(switch), Phase.WARMUP: range(switch, freeze), Phase.LORA: range(freeze, epochs)}


def sum_by_phase(costs: Mapping[Phase, Sequence[float]], spans: Mapping[Phase, range]) -> dict[Phase, float]:
    """Of a run. `costs`: of each epoch, were it in the phase."""
    return {phase: sum(costs[phase][span.start : span.stop]) for phase, span in spans.items() if span}


def break_even(costs: Sequence[float], never: float) -> int | None:
    """The last switch epoch that costs less than never to switch, of those that cost so much after 1, 2, ... epochs."""
    return max((switch for switch, cost in enumerate(costs, 1) if cost < never), default=None)
