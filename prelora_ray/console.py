"""What a person sees: a run's progress while it goes on, and tables."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from prelora_ray import records
from prelora_ray.config import Settings
from prelora_ray.report.sweep_table import sweep_table as sweep_rows
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.replay import Replay

if TYPE_CHECKING:
    from prelora_ray.data.manifest import Manifest
    from prelora_ray.inference.evaluate import EvaluationReport
    from prelora_ray.plan.result import Plan
    from prelora_ray.sweep.map import Point

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
"""Text is shown as it is: a path may hold `[old]` or `:x:`, which Rich would take for its own. Style goes by `Text`."""
out = Console(**_PLAIN, width=None if sys.stdout.isatty() else 160)
"""Standard output: results. A log or a pipe has no width of its own."""
err = Console(**_PLAIN, stderr=True)
"""Standard error: everything else."""
_LISTED_CLASSES = 20


@contextmanager
def watch(settings: Settings) -> Iterator[None]:
    """Shows the run's progress for the time of the block: a bar on a terminal, a line an epoch everywhere."""
    watcher = _Watcher(settings)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for the time of the block; yields what moves it, (done, total)."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Watcher(threading.Thread):
    """Reads what the run writes into its folder, and prints what is new."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self._folder = RunFolder.of(settings)
        self._done = threading.Event()
        self._num_epochs = len(self._folder.records(records.EpochLine))
        self._num_events = len(self._folder.events())
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=settings.train.epochs, status="")

    def run(self) -> None:
        with self._bar:
            while not self._done.wait(0.5 if self._folder.is_local else 10):
                self._show_new()
            self._show_new()

    def stop(self) -> None:
        self._done.set()
        self.join(timeout=30)

    def _show_new(self) -> None:
        try:
            for line in sorted(self._new(), key=lambda line: (line.attempt, line.epoch, isinstance(line, records.Event))):
                text = self._event(line) if isinstance(line, records.Event) else self._epoch(line)
                if text:
                    self._bar.console.print(text)
            if self._folder.exists("progress.json"):
                self._show_position(self._folder.read_progress())
        except (OSError, ValueError):  # the next poll will show it; the run itself does not depend on it
            pass

    def _new(self) -> list[records.Event | records.EpochLine]:
        events, epochs = self._folder.events(), self._folder.records(records.EpochLine)
        new: list[records.Event | records.EpochLine] = [*events[self._num_events :], *epochs[self._num_epochs :]]
        self._num_events, self._num_epochs = len(events), len(epochs)
        return new

    def _show_position(self, position: records.Progress) -> None:
        self._bar.update(
            self._task,
            description=position.phase,
            completed=position.epoch + position.batch / position.batches,
            status=f"epoch {position.epoch + 1}, loss {_number(position.loss)}, {position.images_per_second:,.0f} images/s",
        )

    def _epoch(self, line: records.EpochLine) -> str:
        width = len(str(self._settings.train.epochs))
        parts = [
            f"epoch {line.epoch + 1:{width}d}/{self._settings.train.epochs}",
            f"{line.phase:6s}",
            *([f"{line.image_size} px"] if self._settings.train.resolution else []),
            f"loss {_number(line.loss)}",
            f"top-1 {_percent(line.val_top1)}",
            f"{line.images_per_second:,.0f} images/s",
        ]
        self._bar.update(self._task, completed=line.epoch + 1)
        return "  ".join(parts)

    def _event(self, event: records.Event) -> Text | str | None:
        match event:
            case records.WindowClosed():
                return self._window(event.window)
            case records.Switch():
                left = "" if event.rate_left is None else f" with {event.rate_left:.1%} of the learning rate's sum left"
                told = f" after epoch {event.epoch}{left}: adapters join, {event.trainable_parameters:,} parameters train"
                return Text.assemble(("switch", "bold"), told)
            case records.Freeze():
                share = event.trainable_parameters / event.parameters
                told = f" after epoch {event.epoch}: {event.trainable_parameters:,} parameters train ({share:.1%})"
                return Text.assemble(("freeze", "bold"), told)
            case records.RunStarted() | records.Restart():
                at = f" from epoch {event.epoch}" if event.epoch else ""
                told = f"{at} with {event.world_size} workers, phase {event.phase}"
                return Text.assemble((event.event.replace("_", " "), "bold"), told)
            case records.CheckpointDamaged() | records.InitFrom() | records.Diagnosis():
                return Text(event.message, "bold")
        return None

    def _window(self, window: int) -> str | None:
        line = next((w for w in reversed(self._folder.records(records.WindowLine)) if w.window == window), None)
        if line is None or line.change is None or line.phase != "full":
            return None
        method = self._settings.method
        family, change = max(line.change.items(), key=lambda item: float("inf") if item[1] is None else item[1])
        verdict = "converged" if line.converged else "in the learning-rate ramp, no verdict" if line.in_ramp else "not yet"
        return (
            f"  window {window}: norms change by up to {_number(change)} % ({family}; tau {method.tau:g}), "
            f"the loss by {_number(line.loss_change)} % (zeta {method.zeta:g}): {verdict}"
        )


def prepared(manifest: Manifest) -> Iterator[str | Table]:
    """What `prepare` made of a source: how it was read, what was stored of each class, and what was left out."""
    counts = manifest.counts
    if counts is None:
        return
    yield from counts.notes
    stored = counts.classes
    if len(manifest.classes) <= _LISTED_CLASSES:
        table = Table("class", "train", "val")
        for name, *numbers in zip(manifest.classes, stored["train"], stored["val"], strict=True):
            table.add_row(name, *(f"{number:,}" for number in numbers))
        yield table
    else:
        ranges = (f"{min(numbers):,} to {max(numbers):,} {split} images" for split, numbers in stored.items())
        yield f"a class has {' and '.join(ranges)}; the fewest: {manifest.classes[int(np.argmin(stored['train']))]}"
    yield f"seen {counts.seen:,}, stored {sum(map(sum, stored.values())):,}, skipped {sum(s.count for s in counts.skipped):,}"
    for reason, skipped in itertools.groupby(counts.skipped, lambda entry: entry.reason):
        yield f"  {reason}: " + ", ".join(f"{entry.count:,} {entry.ending or 'without an ending'}" for entry in skipped)


def result_table(path: str, epochs: list[records.EpochLine]) -> Table:
    """A run by phase. `epochs`: its lines that stand."""
    table = Table(title=f"run {path}", title_justify="left")
    for column in ("phase", "epochs", "loss", "top-1", "images/s", "trains", "peak memory", "seconds"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, summary in records.table_summaries(epochs).items():
        table.add_row(
            name,
            str(summary.epochs),
            _number(summary.loss),
            _percent(summary.val_top1),
            f"{summary.images_per_second:,.0f}",
            _percent(summary.trainable_fraction),
            f"{summary.peak_memory_bytes / 2**20:,.0f} MiB",
            f"{summary.seconds:,.0f}",
        )
    return table


def result_line(result: dict[str, Any]) -> str:
    changes = [
        f"no {change}" if (epoch := result[f"{change}_epoch"]) is None else f"{change} after epoch {epoch}"
        for change in ("switch", "freeze")
    ]
    accuracy = f"top-1 {result['val_top1']:.1%} (best {result['best_val_top1']:.1%})"
    return ", ".join([*changes, accuracy, f"{result['seconds']:,.0f} s"])


def sweep_table(result: dict[str, Any]) -> Table:
    """A sweep's settings, the best first, each with the run that it stands for; `*` marks the Pareto front."""
    head, rows = sweep_rows(result)
    table = Table(title=f"sweep {result['path']}", title_justify="left")
    for column in head:
        table.add_column(column, justify="left" if column in ("diagnosis", "run") else "right")
    for index, row in enumerate(rows):
        table.add_row(*row, end_section=index == len(result["controls"]))  # full training and the controls stand apart
    return table


def classes_table(report: EvaluationReport) -> Table:
    """Top-1 of every class."""
    table = Table("class", "images", "top-1")
    counts = report.confusion.sum(1).tolist()
    for name, count, top1 in zip(report.classes, counts, report.class_top1, strict=True):
        table.add_row(name, str(count), _percent(top1))
    return table


def confusion_table(report: EvaluationReport) -> Table:
    """Images of each class (row) that were taken for another; the most frequent mistakes of a class come first."""
    table = Table("class", "images", "right", "taken for")
    for i, name in enumerate(report.classes):
        row = report.confusion[i].tolist()
        mistakes = sorted(((n, j) for j, n in enumerate(row) if n and j != i), reverse=True)
        told = ", ".join(f"{report.classes[j]} {n}" for n, j in mistakes[:10]) + (", ..." if mistakes[10:] else "")
        table.add_row(name, str(sum(row)), str(row[i]), told)
    return table


def replay_table(replay: Replay) -> Table:
    """The windows of a replay: change of each family, of the loss, and the verdict."""
    table = Table()
    families = list(replay.verdicts[-1].family_change or {}) if replay.verdicts else []
    for column in ("window", "epochs", *families, "loss", "verdict"):
        table.add_column(column, justify="right")
    for verdict in replay.verdicts:
        changes = verdict.family_change or {}
        table.add_row(
            str(verdict.window.index),
            str(verdict.window.epoch_end),
            *[_number(changes.get(family)) for family in families],
            _number(verdict.loss_change),
            "converged" if verdict.converged else "in ramp" if verdict.in_ramp else "",
        )
    return table


def switch_map_table(points: Sequence[Point]) -> Table:
    """Each tau and zeta with what it comes to. `rate left`: of the learning rate's sum, at the switch."""
    table = Table()
    for column in ("tau", "zeta", "switch", "rate left", "ranks", "lora trains", "hours"):
        table.add_column(column, justify="right")
    for point in points:
        counts = ", ".join(f"{count} of {rank}" for rank, count in records.rank_counts(point.ranks or {}).items())
        switch = "never" if point.switch_epoch is None else str(point.switch_epoch)
        left, share = _percent(point.rate_left), _percent(point.trainable_fraction)
        table.add_row(_number(point.tau), _number(point.zeta), switch, left, counts, share, _number(point.hours))
    return table


def planned(plan: Plan) -> Iterator[str | Table]:
    """A plan: what it is of, its kinds of step, its runs, and what is assumed."""
    link = "" if plan.bandwidth_gbit is None else f", {plan.bandwidth_gbit:g} Gbit/s between them"
    yield (
        f"{plan.name}: {plan.model}, {plan.epochs} epochs of {plan.images:,} images in batches of {plan.batch_size:,}, on "
        f"{plan.gpus} x {plan.gpu}{link}"
    )
    yield _steps_table(plan)
    yield _runs_table(plan)
    if plan.gpu_hours_by_switch:
        epoch = plan.break_even_epoch
        yield (
            "no switch epoch costs less than full training"
            if epoch is None
            else (f"break-even: a switch after epoch {epoch} or before costs less than full training")
        )
    yield from plan.notes


def _steps_table(plan: Plan) -> Table:
    table = Table()
    compares = any(step.measured_images_per_second is not None for step in plan.phases)
    columns = ["images/s a GPU", "step, ms", "waits, ms", "grads, MB", "trains", "at once", "GiB", "fits", "speed"]
    if compares:
        columns[1:1] = ["measured", "off by"]
    for column in ("phase", "pixels", "format", *columns):
        table.add_column(column, justify="left" if column in ("phase", "format", "fits", "speed") else "right")
    for step in plan.phases:
        rate = step.measured_images_per_second
        told = ("-", "-") if rate is None else (f"{rate:,.0f}", f"{step.images_per_second / rate - 1:+.1%}")
        table.add_row(
            step.phase,
            str(step.image_size),
            step.format,
            f"{step.images_per_second:,.0f}",
            *(told if compares else ()),
            f"{step.step_ms:,.0f}",
            f"{step.waiting_ms:,.0f}",
            f"{step.exchanged_bytes / 1e6:,.1f}",
            _percent(step.trainable_parameters / step.parameters),
            str(step.micro_batch),
            _number(step.memory_gib),
            {None: "?", True: "yes", False: f"no, {step.largest_micro_batch} do"}[step.fits],
            step.source,
        )
    return table


def _runs_table(plan: Plan) -> Table:
    phases = list(dict.fromkeys(phase for run in plan.runs for phase in run.epochs))
    table = Table()
    for column in ("run", "epochs", *phases, "in all, GPU-hours", "of full", "of timm", "same cost in full"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in plan.runs:
        table.add_row(
            run.name,
            " + ".join(map(str, run.epochs.values())),
            *(_hours(run.gpu_hours.get(phase), run.hours.get(phase)) for phase in phases),
            _hours(run.total_gpu_hours, run.total_hours),
            f"{run.of_full:.3f}",
            "-" if run.of_timm is None else f"{run.of_timm:.3f}",
            f"{run.full_epochs:.0f} epochs",
        )
    return table


def _hours(gpu_hours: float | None, hours: float | None) -> str:
    return "-" if gpu_hours is None else f"{_figure(gpu_hours)} in {_figure(hours)} h"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def bench_table(result: dict[str, Any]) -> Table:
    """A benchmark's rows, as they come."""
    table = Table(title=f"{result['benchmark']} on {result['device']}, {result['date']}", title_justify="left")
    columns = [column for column in (result["rows"][0] if result["rows"] else ()) if column != "kernels"]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == "name" else "right")
    for row in result["rows"]:
        table.add_row(*(_figure(row[column]) for column in columns))
    return table


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
