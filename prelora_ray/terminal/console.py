"""What a person sees: tables, and a bar for what takes a while."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from prelora_ray.measures import measures_of
from prelora_ray.method.architecture import ARCHITECTURES, Layers
from prelora_ray.recorded.remarks import remarks_on
from prelora_ray.recorded.replay import Replay
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import Diagnosis
from prelora_ray.report.phase_table import phase_rows
from prelora_ray.report.sweep_table import sweep_table as sweep_rows
from prelora_ray.run_folder import RunFolder
from prelora_ray.summaries import gain_note, memory_note, rank_counts
from prelora_ray.words import ago, counted, modules_by_rank, number, percent

if TYPE_CHECKING:
    from prelora_ray.data.manifest import Counts, Manifest
    from prelora_ray.inference.evaluate import EvaluationReport
    from prelora_ray.inference.predict import Prediction
    from prelora_ray.plan.result import Plan
    from prelora_ray.recorded.runs import RunState
    from prelora_ray.sweep.map import Point
    from prelora_ray.train.dry_run import DryRun

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
"""Text is shown as it is: a path may hold `[old]` or `:x:`, which Rich would take for its own. Style goes by `Text`."""
out = Console(**_PLAIN, width=None if sys.stdout.isatty() else 160)
"""Standard output: results. A log or a pipe has no width of its own."""
err = Console(**_PLAIN, stderr=True)
"""Standard error: everything else."""
_LISTED_CLASSES = 20
_LISTED_POINTS = 40


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for the time of the block; yields what moves it, (done, total)."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def prepared(manifest: Manifest) -> Iterator[str | Table]:
    """What `prepare` made of a source: how it was read, what was stored of each class, and what was left out."""
    counts = manifest.counts
    if counts is None:
        return
    yield from counts.notes
    stored = counts.classes
    if manifest.text is not None:
        yield from _skipped(counts)
        return
    if len(manifest.classes) <= _LISTED_CLASSES:
        table = Table("class", "train", "val")
        for name, *numbers in zip(manifest.classes, stored["train"], stored["val"], strict=True):
            table.add_row(name, *(f"{count:,}" for count in numbers))
        yield table
    else:
        ranges = (f"{min(numbers):,} to {max(numbers):,} images of {split}" for split, numbers in stored.items())
        yield f"a class has {' and '.join(ranges)}; the fewest: {manifest.classes[int(np.argmin(stored['train']))]}"
    yield from _skipped(counts)


def _skipped(counts: Counts) -> Iterator[str]:
    stored = sum(map(sum, counts.classes.values()))
    yield f"seen {counts.seen:,}, stored {stored:,}, skipped {sum(entry.count for entry in counts.skipped):,}"
    for reason, skipped in itertools.groupby(counts.skipped, lambda entry: entry.reason):
        yield f"  {reason}: " + ", ".join(f"{entry.count:,} {entry.ending or 'without an ending'}" for entry in skipped)


def result_table(run: RunRecords) -> Table:
    """A run by phase. What waits for images is told below it, where that is what holds a phase up."""
    table = Table(title=f"run {run.folder}", title_justify="left")
    left_out = ("waits, %",) if run.on_gpu else ("waits, %", "memory, GiB")
    rows = phase_rows(run)
    columns = [column for column in rows[0] if column not in left_out]
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def architectures_table() -> Table:
    """How a model is recognised."""
    table = Table(title="A model is of the first architecture whose blocks it has", title_justify="left", show_lines=True)
    for column in ("architecture", "its blocks are in", "each has one of", "and one of"):
        table.add_column(column, overflow="fold")
    for architecture in ARCHITECTURES:
        parts = ("\n".join(_form(form) for form in part) for part in architecture.parts)
        table.add_row(architecture.name, architecture.stages, *parts)
    return table


def _form(form: Layers) -> str:
    """`attn.qkv (query, key, value), attn.proj`: layers, and the families in each that its name does not tell."""
    told = {path: ", ".join(held) or "no adapter" for path, held in form.items()}
    return ", ".join(path if path.split(".")[-1] == families else f"{path} ({families})" for path, families in told.items())


def runs_table(storage: str, runs: Sequence[RunState]) -> Table:
    """The runs of a storage."""
    table = Table(title=f"{counted(len(runs), 'run')} in {storage}", title_justify="left")
    measures = list(dict.fromkeys(measure for run in runs for measure in measures_of(run.task)))
    for column in ("name", "state", "phase"):
        table.add_column(column)
    for column in ("epoch", *(measure.title for measure in measures), "restarts"):
        table.add_column(column, justify="right")
    table.add_column("last word")
    for run in runs:
        age = "-" if run.time is None else ago(time.time() - run.time)
        table.add_row(
            run.name,
            run.state,
            run.phase or "-",
            "-" if run.epochs is None else f"{run.epoch} of {run.epochs}",
            *(measure.told(getattr(run, measure.key)) for measure in measures),
            str(run.restarts),
            age + (f": {run.message}" if run.message else ""),
        )
    return table


def would_train(dry_run: DryRun) -> Iterator[str]:
    """What `prelora train` would do."""
    run = dry_run
    if run.is_finished:
        yield f"run {run.path} has finished already: nothing would be trained, and nothing was written"
        return
    if run.checkpoint is None:
        yield f"run {run.path} would begin"
    else:
        yield f"run {run.path} would go on from checkpoint {run.checkpoint}, after epoch {run.epoch} of {run.epochs}"
    yield f"model {run.model}, {counted(run.parameters, 'parameter')}"
    first = "" if run.is_prepared else ", to be prepared first"
    if run.train_images is None:
        yield f"data {run.data}: sequences over a vocabulary of up to {counted(run.classes, 'token')}{first}"
    else:
        of = f"of {counted(run.classes, 'class', 'classes')}"
        if run.sample == "sequence":
            of = f"over a vocabulary of {counted(run.classes, 'token')}"
        yield f"data {run.data}: {run.train_images:,} training and {run.val_images:,} validation {run.sample}s {of}{first}"
    few, most = run.workers
    workers = counted(most, "worker") if few == most else f"{few} to {most} workers"
    each = "one GPU each" if run.gpu else "no GPU"
    batches = "" if run.batches is None else f" of {counted(run.batches, 'batch', 'batches')}"
    yield f"{counted(run.epochs, 'epoch')}{batches} on {workers} with {each}"
    if run.switched_at is not None:
        yield f"it has switched after epoch {run.switched_at}"
    elif run.switch_epoch is not None:
        yield f"switch after epoch {run.switch_epoch}, as the recipe says"
    elif run.first_verdict is not None:
        yield f"switch where the test finds that training has converged, after epoch {run.first_verdict} at the earliest"
    else:
        yield "no switch: full training alone"
    yield "nothing was written"


def trained(folder: RunFolder, result: dict[str, Any]) -> Iterator[str | Table]:
    """What a finished run came to, and what is to be said of it."""
    run = RunRecords(folder)
    yield result_table(run)
    if result["ranks"]:
        yield modules_by_rank(result["ranks"])
    yield result_line(result, run.settings.task)
    if not run.on_gpu:
        yield memory_note(run.epochs)
    if (note := gain_note(run.epochs)) is not None:
        yield note
    yield from remarks_on(run).remarks
    yield from (diagnosis.message for diagnosis in run.events_of(Diagnosis))


def result_line(result: dict[str, Any], task: str = "classification") -> str:
    changes = [
        f"no {change}" if (epoch := result[f"{change}_epoch"]) is None else f"{change} after epoch {epoch}"
        for change in ("switch", "freeze")
    ]
    first, *others = measures_of(task)
    ema = result.get(first.averaged or "")
    averaged = [] if ema is None else [f"averaged weights {first.told(ema)}"]
    told = [*changes, first.told_with_best(result[first.key], result[f"best_{first.key}"])]
    told += [f"{measure.title} {measure.told(result[measure.key])}" for measure in others] + averaged
    return ", ".join([*told, f"{result['seconds']:,.0f} s"])


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
    assert report.confusion is not None, "of images"
    table = Table("class", "images", "top-1")
    counts = report.confusion.sum(1).tolist()
    for name, count, top1 in zip(report.classes, counts, report.class_top1, strict=True):
        table.add_row(name, str(count), percent(top1))
    return table


def confusion_table(report: EvaluationReport) -> Table:
    """Images of each class (row) that were taken for another; the most frequent mistakes of a class come first."""
    assert report.confusion is not None, "of images"
    table = Table("class", "images", "right", "taken for")
    for i, name in enumerate(report.classes):
        row = report.confusion[i].tolist()
        mistakes = sorted(((n, j) for j, n in enumerate(row) if n and j != i), reverse=True)
        told = ", ".join(f"{report.classes[j]} {n}" for n, j in mistakes[:10]) + (", ..." if mistakes[10:] else "")
        table.add_row(name, str(sum(row)), str(row[i]), told)
    return table


def predictions_table(images: Sequence[str], predictions: Sequence[Prediction]) -> Table:
    """The likeliest classes of each image."""
    table = Table()
    for column in ("image", "class", "probability"):
        table.add_column(column, justify="right" if column == "probability" else "left")
    for image, prediction in zip(images, predictions, strict=True):
        for i, (label, share) in enumerate(zip(prediction.labels, prediction.probabilities, strict=True), 1):
            table.add_row(image if i == 1 else "", label, percent(share), end_section=i == len(prediction.labels))
    return table


def replay_table(replay: Replay) -> Table:
    """The windows of a replay: change of each family, of the loss, and the verdict.

    A family's change is what the test goes by, with the sign of its norms' mean: + where they grow.
    """
    table = Table()
    families = list(replay.verdicts[-1].family_change or {}) if replay.verdicts else []
    for column in ("window", "epochs", *families, "loss", "verdict"):
        table.add_column(column, justify="right")
    for verdict in replay.verdicts:
        changes, signed = verdict.family_change or {}, verdict.signed_change or {}
        table.add_row(
            str(verdict.window.index),
            str(verdict.window.epoch_end),
            *[f"{math.copysign(changes[family], signed[family]):+.4g}" if changes else "-" for family in families],
            number(verdict.loss_change),
            "converged" if verdict.converged else "in ramp" if verdict.in_ramp else "",
        )
    return table


def switch_map_table(points: Sequence[Point]) -> Table:
    """Each tau and zeta with what it comes to; of many, each switch with the number and the range of its pairs.

    `rate left`: of the learning rate's sum, at the switch.
    """
    is_long = len(points) > _LISTED_POINTS
    groups: dict[float, list[Point]] = {}
    for index, point in enumerate(points):
        switch = math.inf if point.switch_epoch is None else point.switch_epoch
        groups.setdefault(switch if is_long else index, []).append(point)
    table = Table()
    for column in ("tau", "zeta", *(["pairs"] if is_long else []), "switch", "rate left", "ranks", "lora trains", "hours"):
        table.add_column(column, justify="right")
    for group in (groups[key] for key in sorted(groups)):
        point = group[0]  # what it comes to follows from the switch
        table.add_row(
            _range([point.tau for point in group]),
            _range([point.zeta for point in group]),
            *([f"{len(group):,}"] if is_long else []),
            "never" if point.switch_epoch is None else str(point.switch_epoch),
            percent(point.rate_left),
            ", ".join(f"{count} of {rank}" for rank, count in rank_counts(point.ranks or {}).items()),
            percent(point.trainable_fraction),
            number(point.hours),
        )
    return table


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def planned(plan: Plan) -> Iterator[str | Table]:
    """A plan: what it is of, its kinds of step, its runs, and what is assumed."""
    link = "" if plan.bandwidth_gbit is None else f", {plan.bandwidth_gbit:g} Gbit/s between them"
    yield (
        f"{plan.name}: {plan.model}, {counted(plan.epochs, 'epoch')} of {counted(plan.images, 'image')} in batches of "
        f"{plan.batch_size:,}, on {plan.gpus} x {plan.gpu}{link}"
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
    columns = ["images/s a GPU", "step, ms", "waits, ms", "grads, MB", "trains", "at once", "GiB", "least", "fits", "speed"]
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
            percent(step.trainable_parameters / step.parameters),
            str(step.micro_batch),
            number(step.memory_gib),
            number(step.least_gib),
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
            counted(round(run.full_epochs), "epoch"),
        )
    return table


def _hours(gpu_hours: float | None, hours: float | None) -> str:
    return "-" if gpu_hours is None else f"{_figure(gpu_hours)} in {_figure(hours)} h"


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
