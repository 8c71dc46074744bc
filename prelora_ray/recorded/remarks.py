"""What is to be said of a run beside its numbers: how far it came, why it has not switched, whether it learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prelora_ray.config import MethodSettings, Settings
from prelora_ray.fault_tolerance.end import read_end
from prelora_ray.method.convergence import Verdict
from prelora_ray.records import EpochLine, Freeze, NormsLine, Switch
from prelora_ray.run_folder import RunFolder
from prelora_ray.schedule import decide, phase_schedule
from prelora_ray.summaries import last_top1

_LITTLE = 3.0
"""A run has hardly learned where its top-1 is less than so many times what guessing comes to, ..."""
_LITTLE_SHARE = 0.15
"""... or the share that it has of the way from there to 1 is less than this."""


@dataclass(frozen=True)
class Remarks:
    progress: str
    """`finished`; or that it is not, how far it came, and what ended it."""
    is_finished: bool
    remarks: tuple[str, ...]
    """A sentence for each thing that keeps it from being what its recipe asks for."""


def remarks_on(folder: RunFolder) -> Remarks:
    """Raises UserError where the folder holds no run."""
    settings, epochs = folder.read_settings(), folder.epochs()
    is_finished = folder.exists("result.json")
    progress = "finished" if is_finished else _unfinished(folder, len(epochs), settings.train.epochs)
    remarks = [_not_switched(folder, settings), _not_frozen(folder, epochs), _hardly_learned(folder, settings, epochs)]
    return Remarks(progress, is_finished, tuple(remark for remark in remarks if remark is not None))


def why_no_switch(method: MethodSettings, verdicts: Sequence[Verdict], epochs: int) -> str:
    """What kept the test from a switch, and which thresholds would have brought one during a run of so many epochs.

    `verdicts`: of all windows so far, by a test that did not switch.
    """
    taken = [verdict for verdict in verdicts if verdict.largest is not None]
    if not taken:
        needed = f"{method.windows} windows of {method.window_epochs} epochs"
        return f"of {len(verdicts)} windows none had a verdict, which takes {needed}, all but the first behind the ramp"
    index = verdicts.index(taken[-1])
    steps = verdicts[index - method.windows + 2 : index + 1]
    change, family = max((change, name) for step in steps for name, change in (step.family_change or {}).items())
    loss_change = max(step.loss_change or 0.0 for step in steps)
    kept = []
    if change >= method.tau:
        kept.append(f"the norms of {family} changed by {change:.3g} %, where method.tau = {method.tau:g} wants less")
    if loss_change > method.zeta:
        kept.append(f"the loss changed by {loss_change:.3g} %, where method.zeta = {method.zeta:g} wants no more")
    others = _others(method, taken, epochs)
    instead = f"{' and '.join(others)}: try that, or" if others else "try"
    kept_it = " and ".join(kept)
    return f"in the last {method.windows} windows {kept_it}; {instead} more epochs, or method.switch_epoch"


def _others(method: MethodSettings, taken: Sequence[Verdict], epochs: int) -> list[str]:
    """Thresholds that would have brought a switch, each alone where that is enough, and both where neither is."""
    found = [verdict.largest for verdict in taken if verdict.largest and verdict.window.epoch_end < epochs]
    found = [largest for largest in found if all(map(math.isfinite, largest))]
    taus = [_above(change) for change, loss in found if loss <= method.zeta]
    zetas = [_above(loss) for change, loss in found if change < method.tau]
    pairs = [(min(taus), method.zeta)] if taus else []
    pairs += [(method.tau, min(zetas))] if zetas else []
    if not pairs and found:
        both = ((max(method.tau, _above(change)), max(method.zeta, _above(loss))) for change, loss in found)
        pairs = [min(both, key=lambda pair: pair[0] * pair[1])]
    told = []
    for tau, zeta in pairs:
        changed = {"tau": tau} if zeta == method.zeta else {"zeta": zeta} if tau == method.tau else {"tau": tau, "zeta": zeta}
        keys = " with ".join(f"method.{key} = {value:g}" for key, value in changed.items())
        end = next(verdict.window.epoch_end for verdict in taken if verdict.is_under(tau, zeta))
        told.append(f"{keys} would have switched after epoch {end}")
    return told


def _above(value: float) -> float:
    """The next larger number of two digits, from 0.0011 on: thresholds are read and written by people."""
    value = max(value, 1e-3)
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor(value / step + 1e-9) + 1) * step:.2g}")


def _unfinished(folder: RunFolder, done: int, epochs: int) -> str:
    end = read_end(folder)
    after = f"after {done} of {epochs} epochs"
    if end is None or end.end == "finished":
        return f"unfinished {after}"
    if end.end == "failed":
        return f"failed {after}: {end.message}"
    return f"{'stopped' if end.end == 'stop' else 'left nodes that were about to go'} {after}"


def _not_switched(folder: RunFolder, settings: Settings) -> str | None:
    """None where it has, or another rule than the test decides."""
    method = settings.method
    if not method.enabled or method.switch_epoch is not None or folder.events_of(Switch):
        return None
    lines: list[NormsLine] = [line for index, line in enumerate(folder.norms()) if line.epoch == index]
    if not lines:
        return None
    schedule = phase_schedule(method, settings.train.ramp_epochs, list(lines[0].norms))
    verdicts = [decision.verdict for decision in decide(schedule, lines) if decision.verdict is not None]
    if schedule.switched_at is not None:
        return None
    return f"no switch: {why_no_switch(method, verdicts, settings.train.epochs)}"


def _not_frozen(folder: RunFolder, epochs: Sequence[EpochLine]) -> str | None:
    """None as long as it may come."""
    if not folder.exists("result.json") or not folder.events_of(Switch) or folder.events_of(Freeze):
        return None
    switch = folder.events_of(Switch)[-1].switch_epoch
    return (
        f"no freeze: the switch came after epoch {switch} of {epochs[-1].epoch + 1}, within method.warmup_epochs of the end; "
        "try an earlier one, less warmup, or more epochs"
    )


def _hardly_learned(folder: RunFolder, settings: Settings, epochs: Sequence[EpochLine]) -> str | None:
    """None also where it is not known, or the run sees a few images alone."""
    top1 = last_top1(epochs)
    if top1 is None or settings.data.max_batches is not None or not folder.exists("data.json"):
        return None
    num_classes = len(folder.read_classes())
    chance = 1 / num_classes
    if top1 >= min(_LITTLE * chance, chance + _LITTLE_SHARE * (1 - chance)):
        return None
    return (
        f"hardly learned: top-1 is {top1:.1%}, and guessing among {num_classes} classes comes to {chance:.1%}; try another "
        "train.learning_rate, a longer train.ramp_epochs, or weaker augment settings"
    )
