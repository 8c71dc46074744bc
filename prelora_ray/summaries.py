"""What is computed from a run's lines: its phases summed up, its speeds and its times."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from prelora_ray.measures import MEASURED, last_value
from prelora_ray.records import BEGINNINGS, EpochLine, Event

Size = TypeVar("Size")


@dataclass(frozen=True, kw_only=True)
class PhaseSummary:
    """A run's epochs in one phase, summed up."""

    phase: str
    epochs: int
    loss: float
    """Of the last epoch."""
    measures: dict[str, float | None]
    """What its epochs were validated by, by the field of their lines: the last of each; None where there is none."""
    images_per_second: float
    """In the steady state."""
    against_full: float | None
    """A worker's, as a multiple of phase full's on images of one size; None where either has no steady epoch of it."""
    startup_seconds: float | None
    """Seconds of training beyond that speed, in epochs that begin a phase, a size or an attempt; None where all do."""
    seconds: float
    """With validation and all that starts."""
    data_wait_fraction: float
    """Of the seconds of training, in the steady state."""
    peak_memory_bytes: int
    trainable_fraction: float
    """Of the parameters, in the last epoch."""


def by_phase(epochs: Iterable[EpochLine]) -> dict[str, list[EpochLine]]:
    """The lines of each phase, in their order."""
    phases: dict[str, list[EpochLine]] = {}
    for line in epochs:
        phases.setdefault(line.phase, []).append(line)
    return phases


def phase_summaries(epochs: Iterable[EpochLine]) -> dict[str, PhaseSummary]:
    """A summary of each phase, in their order."""
    phases = by_phase(epochs)
    full = by_phase_and_size(phases.get("full", []), _not_known)
    return {phase: _summary(phase, lines, full) for phase, lines in phases.items()}


def table_summaries(epochs: Sequence[EpochLine]) -> dict[str, PhaseSummary]:
    """What a table tells: a summary of each phase, or where its images grew, of each of their sizes: `full, 160 px`.

    Epochs that an earlier version recorded have none: `full, ? px`.
    """
    stages = by_phase_and_size(epochs, _not_known)
    if len({size for _, size in stages if size is not None}) < 2:
        return phase_summaries(epochs)
    return {f"{phase}, {size or '?'} px": _summary(phase, lines, stages) for (phase, size), lines in stages.items()}


def by_phase_and_size(
    epochs: Iterable[EpochLine], image_size: Callable[[int], Size]
) -> dict[tuple[str, int | Size], list[EpochLine]]:
    """The lines of each phase and size of images, in their order.

    `image_size`: of an epoch (from 0), by the run's settings, for those that an earlier version recorded.
    """
    stages: dict[tuple[str, int | Size], list[EpochLine]] = {}
    for line in epochs:
        stages.setdefault((line.phase, line.image_size or image_size(line.epoch)), []).append(line)
    return stages


def _not_known(epoch: int) -> None:
    """The size of images where the settings are not at hand."""


def steady_lines(lines: Sequence[EpochLine]) -> list[EpochLine]:
    """Of the lines of one phase and size of images those in which nothing starts, compiles or fills: all but the first,
    and the first of every attempt."""
    return [line for before, line in itertools.pairwise(lines) if before.attempt == line.attempt]


def in_steady_state(lines: Sequence[EpochLine], value: Callable[[EpochLine], float]) -> float:
    """The median over the steady ones of the lines of one phase and size of images; over all where none is."""
    return statistics.median(map(value, steady_lines(lines) or lines))


GAIN = 1.05
"""A speed below this multiple of another is no gain: epochs of one phase differ by as much."""
_WAITS = 0.1
"""From this share of its time on, a phase's waiting for images is told as what holds it up."""


def gain_note(epochs: Iterable[EpochLine]) -> str | None:
    """A sentence where phase lora is no faster than full training; None where it is, or that is not known."""
    lora = phase_summaries(epochs).get("lora")
    if lora is None or lora.against_full is None or lora.against_full >= GAIN:
        return None
    waits = lora.data_wait_fraction
    why = f"it waits for images {waits:.0%} of its time" if waits >= _WAITS else "at this size freezing saves no time"
    return f"phase lora trains {lora.against_full:.2f} times as fast as full training: {why}"


def memory_note(epochs: Iterable[EpochLine]) -> str:
    """Peak memory of a run on CPUs, and why it is not told by phase."""
    peak = max((line.peak_memory_bytes for line in epochs), default=0)
    return f"peak memory {peak / 2**20:,.0f} MiB, of all phases together: a process on a CPU hardly gives any back"


def _summary(
    phase: str, lines: Sequence[EpochLine], full: Mapping[tuple[str, int | None], Sequence[EpochLine]]
) -> PhaseSummary:
    """`full`: the lines of phase full, by phase and size of images."""
    stages = {size: stage for (_, size), stage in by_phase_and_size(lines, _not_known).items()}
    steady = [line for stage in stages.values() for line in steady_lines(stage) or stage]
    startups = [seconds for stage in stages.values() if (seconds := _startup_seconds(stage)) is not None]
    return PhaseSummary(
        phase=phase,
        epochs=len(lines),
        loss=lines[-1].loss,
        measures={key: last_value(lines, key) for key in MEASURED},
        images_per_second=_rate(stages, stages, lambda line: line.images_per_second),
        against_full=_against_full(stages, {size: stage for (name, size), stage in full.items() if name == "full"}),
        startup_seconds=sum(startups) if startups else None,
        seconds=sum(line.seconds for line in lines),
        data_wait_fraction=sum(line.data_wait_seconds for line in steady) / sum(line.train_seconds for line in steady),
        peak_memory_bytes=max(line.peak_memory_bytes for line in lines),
        trainable_fraction=lines[-1].trainable_fraction,
    )


_Stages = Mapping[int | None, Sequence[EpochLine]]
"""Lines of one phase, by size of images."""


def _rate(stages: _Stages, epochs: _Stages, rate: Callable[[EpochLine], float]) -> float:
    """In the steady state of `stages`, over as many epochs of each size as `epochs` has, each of as many images."""
    return statistics.harmonic_mean(
        [in_steady_state(stages[size], rate) for size in epochs], [len(lines) for lines in epochs.values()]
    )


def _against_full(stages: _Stages, full: _Stages) -> float | None:
    """By worker, as the number of workers may change; None where either has but epochs that begin something."""
    if not all(steady_lines(stage) and steady_lines(full.get(size, ())) for size, stage in stages.items()):
        return None
    own, theirs = (_rate(of, stages, lambda line: line.images_per_second / line.world_size) for of in (stages, full))
    return own / theirs


def _startup_seconds(lines: Sequence[EpochLine]) -> float | None:
    """Of lines of one size, by worker, as the number of workers may change; None where none of them is steady."""
    steady = steady_lines(lines)
    if not steady:
        return None

    def of_worker(line: EpochLine) -> float:
        return line.images_per_second / line.world_size

    rate = in_steady_state(lines, of_worker)
    others = [line for line in lines if line not in steady]
    return sum(max(0.0, line.train_seconds * (1 - of_worker(line) / rate)) for line in others)


_SLOW_SHARE = 0.15
"""Of its time that a worker has to wait less for gradients than the others in the median, to be called slow."""
_SLOW_EXCHANGE = 0.3
"""Share of its time that even the worker that waits least waits for gradients, where the network is called slow."""
_TELLING_SECONDS = 60.0
"""Of training, over less of which nothing is told."""


@dataclass(frozen=True)
class Slowness:
    """What holds up the workers of a run, in shares of their time of training."""

    worker: int | None
    """Rank of the one that the others wait for; None where they all wait for the network."""
    cause: Literal["data", "compute", "exchange"]
    share: float
    """What the cause takes of that worker's time; of the network, of the time of the worker that waits least for it."""
    others: float | None
    """What it takes of the others', in the median; None of the network."""
    wait: float | None
    """What the others' wait for gradients takes of their time, in the median; None of the network."""


def slowness(epochs: Sequence[EpochLine]) -> Slowness | None:
    """None where no worker is slow, or too little is known: of the run's own newest attempt and phase, after its first
    epoch."""
    own = [line for line in epochs if line.attempt >= 0]  # others are of a fork's trunk
    lines = [line for line in own if (line.attempt, line.phase) == (own[-1].attempt, own[-1].phase)][1:]
    known = [line.worker_seconds for line in lines if line.worker_seconds is not None]
    if not known or sum(line.train_seconds for line in lines) < _TELLING_SECONDS or len(known[0]["data"]) == 1:
        return None
    sums = {kind: [sum(of_worker) for of_worker in zip(*(of[kind] for of in known), strict=True)] for kind in known[0]}
    wholes = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    shares = {kind: [part / whole for part, whole in zip(sums[kind], wholes, strict=True)] for kind in sums}
    worker = min(range(len(wholes)), key=shares["exchange"].__getitem__)
    others = {kind: statistics.median(of_all[:worker] + of_all[worker + 1 :]) for kind, of_all in shares.items()}
    if others["exchange"] - shares["exchange"][worker] > _SLOW_SHARE:
        excess = {kind: shares[kind][worker] - others[kind] for kind in ("data", "compute")}
        cause: Literal["data", "compute"] = "data" if excess["data"] > excess["compute"] else "compute"
        return Slowness(worker, cause, shares[cause][worker], others[cause], others["exchange"])
    if min(shares["exchange"]) > _SLOW_EXCHANGE:
        return Slowness(None, "exchange", min(shares["exchange"]), None, None)
    return None


def restarts(events: Iterable[Event]) -> int:
    """Attempts after the first. What a fork took over from its trunk is no attempt."""
    return max((event.attempt for event in events if event.attempt > 0), default=0)


def seconds_of_run(events: Iterable[Event]) -> float:
    """Time from each attempt's first event to its last, all attempts together."""
    times: dict[int, list[float]] = {}
    for event in events:
        times.setdefault(event.attempt, []).append(event.time)
    return sum(max(at) - min(at) for at in times.values())


def reservations(events: Iterable[Event]) -> list[dict[str, str]]:
    """What Ray Train has reserved for each attempt that recorded it."""
    return [event.reservation for event in events if isinstance(event, BEGINNINGS) and event.reservation]


_PACE_EPOCHS = 5
"""Epochs whose median duration is the pace."""


def remaining_seconds(epochs: Sequence[EpochLine], still: float) -> float:
    """Time that so many more epochs take at the median pace of the last ones, of which there must be one."""
    return statistics.median(line.seconds for line in epochs[-_PACE_EPOCHS:]) * still


def rank_counts(ranks: Mapping[str, int]) -> dict[int, int]:
    """How many modules have each rank, by rank."""
    values = list(ranks.values())
    return {rank: values.count(rank) for rank in sorted(set(values))}
