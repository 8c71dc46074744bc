"""full -> warmup -> lora: the one place that decides what trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from torch import nn

from prelora_ray.method.adapters import is_adapter_parameter, lora_layers
from prelora_ray.method.architecture import Target, head_parameters, parameters_in_front
from prelora_ray.method.convergence import ConvergenceTest, Verdict

FreezeScope = Literal["adapted", "all_but_head", "prefix"]


class Phase(StrEnum):
    FULL = "full"
    """All parameters train."""
    WARMUP = "warmup"
    """Base and adapters train together."""
    LORA = "lora"
    """The adapted weights are frozen."""


@dataclass(frozen=True)
class Decision:
    """What the end of an epoch brings."""

    verdict: Verdict | None = None
    """The test's, where the epoch ends a window."""
    switch: dict[str, int] | None = None
    """Rank by module name, where the run leaves phase full now."""
    freeze: bool = False
    """Whether phase lora begins now."""

    @property
    def begins_phase(self) -> bool:
        return self.switch is not None or self.freeze


class PhaseSchedule:
    """Decides at the end of every epoch whether the run switches or freezes.

    `assign` turns the modules' percent changes over the last step into ranks. With `switch_epoch`
    the run switches after that many epochs instead of by the test; with ``enabled=False`` never.
    """

    def __init__(
        self,
        test: ConvergenceTest,
        assign: Callable[[dict[str, float]], dict[str, int]],
        warmup_epochs: int,
        switch_epoch: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.test = test
        self.phase = Phase.FULL
        self.switched_at: int | None = None
        self.frozen_at: int | None = None
        self.ranks: dict[str, int] | None = None
        self._assign = assign
        self._warmup_epochs = warmup_epochs
        self._switch_epoch = switch_epoch
        self._enabled = enabled
        self._last_change: dict[str, float] | None = None

    def end_epoch(self, epoch: int, norms: dict[str, float], loss: float) -> Decision:
        """Takes the record of epoch number `epoch` (from 0) and moves on to the next epoch's phase."""
        completed = epoch + 1
        verdict = self.test.end_epoch(epoch, norms, loss)
        if verdict is not None and verdict.module_change is not None:
            self._last_change = verdict.module_change
        switch = None
        if self.phase is Phase.FULL and self._enabled and self._switches(completed, verdict):
            # A switch_epoch before any change is known is for given ranks, which do not ask for one.
            switch = self.ranks = self._assign(self._last_change or {})
            self.phase, self.switched_at = Phase.WARMUP, completed
        freeze = self.phase is Phase.WARMUP and completed - (self.switched_at or 0) >= self._warmup_epochs
        if freeze:
            self.phase, self.frozen_at = Phase.LORA, completed
        return Decision(verdict, switch, freeze)

    def enter(self, phase: Phase, ranks: dict[str, int] | None, completed: int) -> Decision:
        """Enters a later phase after `completed` epochs, whatever the test says; on leaving full, with `ranks`."""
        switches = self.phase is Phase.FULL and phase is not Phase.FULL
        freezes = self.phase is not Phase.LORA and phase is Phase.LORA
        if switches:
            self.ranks, self.switched_at = ranks, completed
        if freezes:
            self.frozen_at = completed
        self.phase = phase
        return Decision(switch=ranks if switches else None, freeze=freezes)

    def _switches(self, completed: int, verdict: Verdict | None) -> bool:
        if self._switch_epoch is not None:
            return completed == self._switch_epoch
        return verdict is not None and verdict.converged

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on deciding, as JSON can hold it (an infinite change is null)."""
        return {
            "phase": self.phase.value,
            "switch_epoch": self.switched_at,
            "freeze_epoch": self.frozen_at,
            "ranks": self.ranks,
            "last_change": self._last_change
            and {name: None if math.isinf(change) else change for name, change in self._last_change.items()},
            "test": self.test.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phase = Phase(state["phase"])
        self.switched_at = state["switch_epoch"]
        self.frozen_at = state["freeze_epoch"]
        self.ranks = state["ranks"]
        self._last_change = state["last_change"] and {
            name: math.inf if change is None else change for name, change in state["last_change"].items()
        }
        self.test.load_state_dict(state["test"])


def freeze_parameters(model: nn.Module, targets: Sequence[Target], freeze: FreezeScope) -> None:
    """Freezes what phase lora no longer trains.

    ``adapted``: the weights and biases of the target modules' layers (a fused qkv as a whole), those
    included that got no adapter because they hardly changed. ``all_but_head``: everything but the adapters and the
    head. ``prefix``: as ``adapted``, and everything in front of the first block that has an adapter, so that
    the backward stops there.

    Raises ValueError for ``all_but_head`` where the model has no head.
    """
    adapted = lora_layers(model)
    assert adapted, "phase lora begins with adapters in place"
    for name in {target.stored_in for target in targets}:
        layer = model.get_submodule(name)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
    if freeze == "all_but_head":
        head = head_parameters(model)
        if not head:
            raise ValueError("the model has no head")
        for name, parameter in model.named_parameters():
            if not is_adapter_parameter(name) and name not in head:
                parameter.requires_grad_(False)
    elif freeze == "prefix":
        for parameter in parameters_in_front(model, min(target.layer for target in targets if target.stored_in in adapted)):
            parameter.requires_grad_(False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, adapters included."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
