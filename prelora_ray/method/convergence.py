"""Windows of epochs, and the partial convergence test over them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from prelora_ray.method.architecture import family_of

NormStatistic = Literal["last", "mean"]


@dataclass(frozen=True)
class Window:
    """Summary of ``window_epochs`` consecutive epochs."""

    index: int
    epoch_end: int
    """Number of epochs completed at the window's end."""
    norms: dict[str, float]
    """Frobenius norm by module name: the last epoch's, or the mean over the window."""
    loss: float
    """Mean training loss per sample over the window."""


@dataclass(frozen=True)
class Step:
    """What changed from a window to the next one, in which it happened; in percent."""

    epoch_end: int
    """Number of epochs completed at its end."""
    family_change: dict[str, float]
    loss_change: float
    signed_change: dict[str, float] = field(default_factory=dict)
    """As `family_change`, with the sign of each module's: above 0 where norms grow. Not in all records."""

    def is_under(self, tau: float, zeta: float) -> dict[str, bool]:
        """Of each family, and of the loss as `loss`, whether its change is under its threshold."""
        families = {family: change < tau for family, change in self.family_change.items()}
        return families | {"loss": self.loss_change <= zeta}


@dataclass(frozen=True)
class Verdict:
    """What the test says at the end of a window. Changes are in percent and None for window 0."""

    window: Window
    module_change: dict[str, float] | None
    """Change of every module's norm since the window before."""
    family_change: dict[str, float] | None
    """dW: mean of module_change over the layers of a family."""
    signed_change: dict[str, float] | None
    """As family_change, with the sign of each module's: above 0 where norms grow."""
    loss_change: float | None
    """dL."""
    in_ramp: bool
    """Some window that the test compares lies in the learning-rate ramp, so that no verdict is taken."""
    steps: tuple[Step, ...]
    """Those that it rests on, in order; none where no verdict is taken."""
    converged: bool

    @functools.cached_property
    def largest(self) -> tuple[float, float] | None:
        """Largest family change and loss change of the steps that it rests on; None where no verdict is taken."""
        if not self.steps:
            return None
        changes = [change for step in self.steps for change in step.family_change.values()]
        return max(changes), max(step.loss_change for step in self.steps)

    @property
    def growing(self) -> list[str]:
        """Families whose norms grow in one of the steps that it rests on."""
        return self._families(lambda change: change > 0)

    @property
    def shrinking(self) -> list[str]:
        """Families whose norms shrink in one of the steps that it rests on, which may be growing in another."""
        return self._families(lambda change: change < 0)

    def _families(self, chosen: Callable[[float], bool]) -> list[str]:
        return list(dict.fromkeys(family for step in self.steps for family, of in step.signed_change.items() if chosen(of)))

    def is_under(self, tau: float, zeta: float) -> bool:
        """Whether the run has partially converged for these thresholds."""
        return self.largest is not None and self.largest[0] < tau and self.largest[1] <= zeta

    def record(self) -> dict[str, Any]:
        """What a run records of it; norms.jsonl has the norms."""
        return {
            "window": self.window.index,
            "epoch_end": self.window.epoch_end,
            "loss": self.window.loss,
            "change": self.family_change,
            "signed_change": self.signed_change,
            "loss_change": self.loss_change,
            "converged": self.converged,
            "in_ramp": self.in_ramp,
        }


def percent_change(before: float, after: float) -> float:
    """|after - before| / |before| x 100. Zero that stays zero is no change; leaving zero is an infinite one."""
    return abs(signed_percent_change(before, after))


def signed_percent_change(before: float, after: float) -> float:
    """(after - before) / |before| x 100, as `percent_change`."""
    if before == 0:
        return math.copysign(math.inf, after) if after != 0 else 0.0
    return (after - before) / abs(before) * 100


def family_changes(module_change: dict[str, float]) -> dict[str, float]:
    """Mean change over the layers of each family, in percent."""
    members: dict[str, list[float]] = {}
    for name, change in module_change.items():
        members.setdefault(family_of(name), []).append(change)
    return {family: sum(changes) / len(changes) for family, changes in members.items()}


def first_verdict(windows: int, window_epochs: int, ramp_epochs: int) -> int:
    """Epochs that are completed when a ConvergenceTest of these settings takes its first verdict."""
    of_ramp = max(1, -(-ramp_epochs // window_epochs))  # windows in front of the first step that counts
    return (of_ramp + windows - 1) * window_epochs


class ConvergenceTest:
    """The partial convergence test (arXiv 2509.21619, algorithm 1), fed one epoch at a time.

    At the end of window t the run has partially converged when for each of the last
    ``windows - 1`` steps between windows every family's norm change is under ``tau`` and the loss
    change is at most ``zeta``, both in percent. Norms move little while the learning rate is small,
    for that reason alone, so a verdict that rests on a step inside the first ``ramp_epochs`` epochs
    is not taken. Epochs must come in order, each once; a last, shorter window never closes.
    """

    def __init__(
        self,
        tau: float,
        zeta: float,
        windows: int = 3,
        window_epochs: int = 3,
        norm_statistic: NormStatistic = "last",
        ramp_epochs: int = 0,
    ) -> None:
        if windows < 2:
            raise ValueError(f"windows = {windows}: the test compares windows, so it needs at least 2")
        if window_epochs < 1:
            raise ValueError(f"window_epochs = {window_epochs}: a window has at least 1 epoch")
        self.tau = tau
        self.zeta = zeta
        self.windows = windows
        self.window_epochs = window_epochs
        self.norm_statistic = norm_statistic
        self.ramp_epochs = ramp_epochs
        self._open: list[tuple[dict[str, float], float]] = []
        self._closed: list[Window] = []

    def end_epoch(self, epoch: int, norms: dict[str, float], loss: float) -> Verdict | None:
        """Takes the record of epoch number `epoch` (from 0); returns a verdict where it ends a window."""
        assert epoch % self.window_epochs == len(self._open), f"epoch {epoch} does not follow the one before"
        self._open.append((norms, loss))
        if len(self._open) < self.window_epochs:
            return None
        all_norms = [norms for norms, _ in self._open]
        if self.norm_statistic == "mean":
            norms = {name: sum(n[name] for n in all_norms) / len(all_norms) for name in norms}
        mean_loss = sum(loss for _, loss in self._open) / len(self._open)
        self._open = []
        self._closed.append(Window(epoch // self.window_epochs, epoch + 1, norms, mean_loss))
        self._closed = self._closed[-self.windows :]
        return self._verdict()

    def steps_that_count(self, steps: Sequence[Step]) -> list[Step]:
        """Of all steps so far, in order, those that a verdict may rest on: the last `windows - 1`, behind the ramp."""
        return [step for step in steps[1 - self.windows :] if step.epoch_end - self.window_epochs >= self.ramp_epochs]

    def steps_under(self, steps: Sequence[Step]) -> dict[str, int]:
        """Of each family, and of `loss`, how many of the newest steps that count are in a row under its threshold.

        Once all have `windows - 1`, the run has partially converged. `steps`: all so far, in order.
        """
        under = [step.is_under(self.tau, self.zeta) for step in reversed(self.steps_that_count(steps))]
        names = [*steps[-1].family_change, "loss"] if steps else ["loss"]
        return {name: len(list(itertools.takewhile(bool, (step[name] for step in under)))) for name in names}

    def _verdict(self) -> Verdict:
        window = self._closed[-1]
        if len(self._closed) < 2:
            return Verdict(window, None, None, None, None, in_ramp=False, steps=(), converged=False)
        changes = [_signed_changes(before, after) for before, after in itertools.pairwise(self._closed)]
        pairs = zip(itertools.pairwise(self._closed), changes, strict=True)
        steps = [_step(before, after, signed) for (before, after), signed in pairs]
        counted = self.steps_that_count(steps)
        rests_on = tuple(counted) if len(counted) == self.windows - 1 else ()
        last, modules = steps[-1], _absolute(changes[-1])
        in_ramp = len(counted) < len(steps)
        of_families = last.family_change, last.signed_change, last.loss_change
        verdict = Verdict(window, modules, *of_families, in_ramp, rests_on, converged=False)
        return replace(verdict, converged=verdict.is_under(self.tau, self.zeta))

    def state_dict(self) -> dict[str, Any]:
        """The recent windows and the open one, as JSON can hold them."""
        return {"open": [[norms, loss] for norms, loss in self._open], "closed": [asdict(w) for w in self._closed]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._open = [(norms, loss) for norms, loss in state["open"]]
        self._closed = [Window(**window) for window in state["closed"]]


def _step(before: Window, after: Window, signed: dict[str, float]) -> Step:
    change = family_changes(_absolute(signed))
    return Step(after.epoch_end, change, percent_change(before.loss, after.loss), family_changes(signed))


def _signed_changes(before: Window, after: Window) -> dict[str, float]:
    """Of the modules' norms, in percent."""
    return {name: signed_percent_change(before.norms[name], norm) for name, norm in after.norms.items()}


def _absolute(signed: dict[str, float]) -> dict[str, float]:
    return {name: abs(percent) for name, percent in signed.items()}
