"""The command `prelora`."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import prelora_ray
from prelora_ray import __version__
from prelora_ray.api import settings_of
from prelora_ray.bench import commands as bench
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.errors import InterruptedRunError, UserError, WorkError
from prelora_ray.extras import check_installed
from prelora_ray.json_output import Json, print_json
from prelora_ray.options import options_of
from prelora_ray.words import counted, modules_by_rank

if TYPE_CHECKING:
    from prelora_ray.config import MethodSettings, Settings
    from prelora_ray.recorded.replay import Record

app = typer.Typer(
    help="PreLoRA pre-training of Vision Transformers on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")]
app.add_typer(bench.app, name="bench")
_debug = False


def _recipes(incomplete: str) -> list[str]:
    """Completes the name of a recipe; where none fits, the shell completes files."""
    from prelora_ray.config_file import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"prelora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the workers' output.")] = False,
) -> None:
    global _debug
    _debug = debug


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A recipe: a file, or the name of one of ours.", autocompletion=_recipes)],
    overrides: Overrides = None,
    storage: Annotated[str | None, typer.Option(help="Folder or bucket that holds the run folders.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the same name again resumes it.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="A smoke run: 4 batches an epoch through all phases, under a name of its own.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that is checked before training, and tell what would run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a run through full, warmup and lora, or resume it."""
    if dry_run:
        _dry_run(settings_of(config, overrides or [], name=name, storage=storage, fast=fast), as_json)
        return
    result = prelora_ray.train(config, overrides or [], name=name, storage=storage, fast=fast, debug=_debug)
    if as_json:
        print_json(result)
        return

    from prelora_ray.run_folder import RunFolder
    from prelora_ray.terminal import console

    for part in console.trained(RunFolder(result["path"]), result):
        console.out.print(part)


@app.command()
def init(
    file: Annotated[str, typer.Argument(help="The recipe's file, a new one.")],
    data: Annotated[str, typer.Option(help="A prepared folder, or whatever `prelora prepare` takes.")],
    as_json: Json = False,
) -> None:
    """Write a first recipe for your images: a model for their number and size, their mean, batch and epochs."""
    from prelora_ray.config_file import parse_yaml
    from prelora_ray.first_recipe import write_recipe
    from prelora_ray.terminal import console

    with console.progress("images") as show:
        text = write_recipe(file, data, show)
    if as_json:
        print_json({"path": file, "recipe": parse_yaml(text)})
        return
    console.out.print(text)
    console.out.print(f"{file} is yours to change; then: prelora train {file} --dry-run")


def _dry_run(settings: Settings, as_json: bool) -> None:
    from prelora_ray.terminal import console
    from prelora_ray.train.dry_run import dry_run

    result = dry_run(settings, debug=_debug)
    if as_json:
        print_json(asdict(result))
        return
    for line in console.would_train(result):
        console.out.print(line)


@app.command()
def plan(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe; or a run folder, to compare a plan with what was measured.", autocompletion=_recipes),
    ],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs; default: the recipe's workers.max.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Part of the GPU's name; default: H100, or that of --bench.")] = None,
    bench: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Of `prelora bench phases --out FILE`; repeatable. Default: ours."),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Gbit/s of the slowest link that all gradients pass; default: as inside NVLink.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Memory of a GPU in GiB; default: as the files say.")] = None,
    assume_speed: Annotated[
        float | None, typer.Option(help="Take the GPU for so many times as fast as the measured one.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Training images; default: those of data.path.")] = None,
    picture: Annotated[str | None, typer.Option(help="An HTML file for a picture of GPU-hours by switch epoch.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what a recipe will cost: GPU-hours, memory and exchange by phase, beside full training. Runs nothing."""
    from prelora_ray.plan.planner import Options, plan_recipe
    from prelora_ray.storage import check_out_file
    from prelora_ray.terminal import console

    check_out_file("--picture", picture)
    if picture is not None:
        check_installed("--picture", "report", "plotly")
    options = Options(gpus, gpu, tuple(bench or ()), bandwidth, memory, assume_speed, images)
    result = plan_recipe(recipe, overrides or [], options)
    if picture is not None:
        from prelora_ray.report.page import write_plan

        if not result.gpu_hours_by_switch:
            raise UserError(f"--picture {picture} is not allowed: it is over switch epochs, and method.enabled is false")
        levels = {run.name: run.total_gpu_hours for run in result.runs if run.switch_epoch is None}
        write_plan(result.name, result.gpu_hours_by_switch, levels, result.break_even_epoch, picture)
    if as_json:
        print_json({**asdict(result), "picture": picture})
        return
    for part in console.planned(result):
        console.out.print(part)
    if picture is not None:
        console.out.print(f"{picture}: GPU-hours by switch epoch")


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="A sweep, such as jobs/sweeps/digits.yaml.")],
    overrides: Overrides = None,
    storage: Annotated[str | None, typer.Option(help="Folder or bucket that holds the sweep's folder.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; the same name again goes on with it.")] = None,
    as_json: Json = False,
) -> None:
    """Search the method's settings: train the trunk once, fork each distinct run from it, and compare."""
    from prelora_ray.sweep.settings import load_sweep

    plan = load_sweep(config, overrides or [], name=name, storage=storage)

    from prelora_ray.report.sweep_table import told_of_controls, told_of_cost
    from prelora_ray.sweep.run import sweep as run
    from prelora_ray.terminal import console
    from prelora_ray.terminal.live import watch

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # a box of Tune's, with advice that fits neither paths nor names here
    result = run(plan, watch, debug=_debug)
    if as_json:
        print_json(result)
        return
    console.out.print(console.sweep_table(result))
    console.out.print(told_of_cost(result))
    if (told := told_of_controls(result)) is not None:
        console.out.print(told)
    if result["smallest_warmup"] is not None:
        told = counted(result["smallest_warmup"], "epoch")
        console.out.print(f"smallest warmup without a jump of the loss at the freeze: {told}")


@app.command()
@options_of(PrepareSettings)
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="`digits` or `pydoc`; a folder of images, tars, Parquet, IDX or text files; or one tar, Parquet, CSV, TSV or "
            "text file."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder that the prepared images or text go into.")],
    *,
    task: Annotated[Literal["classification", "mlm"], typer.Option(help="A recipe's task: mlm takes text.")] = "classification",
    as_json: Json = False,
    settings: PrepareSettings,
) -> None:
    """Turn images, or with --task mlm text, into the Parquet files that training streams."""
    from prelora_ray.config import absolute_source
    from prelora_ray.data.prepare import prepare as run
    from prelora_ray.nodes import check_seen_by_all_nodes
    from prelora_ray.ray_session import ray_session
    from prelora_ray.storage import absolute, check_out_folder
    from prelora_ray.terminal import console

    start = time.monotonic()
    place, folder = absolute_source(source), absolute(out)
    check_out_folder(folder)
    with ray_session(debug=_debug), console.progress("text" if task == "mlm" else "images") as show:
        check_seen_by_all_nodes([place], [folder])
        manifest = run(place, folder, settings, show, task=task)
    content = {
        "train": manifest.num_images("train"),
        "val": manifest.num_images("val"),
        "classes": len(manifest.classes),
        "bad": manifest.bad,
        "seconds": time.monotonic() - start,
        "path": out,
    }
    if as_json:
        print_json({**content, "counts": manifest.counts and asdict(manifest.counts)})
        return
    for line in console.prepared(manifest):
        console.out.print(line)
    sample, of = "image", counted(len(manifest.classes), "class", "classes")
    if manifest.text is not None:
        sample, of = "sequence", counted(manifest.text.sequence_length, "token")
    console.out.print(
        f"{content['train']:,} training and {counted(manifest.num_images('val'), f'validation {sample}')} of {of} in {out}, "
        f"{content['seconds']:.1f} s"
    )


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, one of its checkpoints, or an exported model.")],
    data: Annotated[str | None, typer.Argument(help="A prepared folder; default: the one of the run.")] = None,
    classes: Annotated[bool, typer.Option("--classes", help="Tell the accuracy of every class.")] = False,
    confusion: Annotated[bool, typer.Option("--confusion", help="Tell which classes are taken for which.")] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a trained model on a prepared validation set."""
    from prelora_ray.terminal import console

    if (classes or confusion) and prelora_ray.load(source).preprocessing is None:
        raise UserError(
            f"--{'classes' if classes else 'confusion'} is not allowed: {source!r} takes text, which has no classes"
        )
    report = prelora_ray.evaluate(source, data, debug=_debug)
    result = report.evaluation
    if as_json:
        content: dict[str, Any] = asdict(result)
        if classes:
            content["class_top1"] = dict(zip(report.classes, report.class_top1, strict=True))
        if confusion:
            content["confusion"] = report.confusion.tolist()  # type: ignore[union-attr]
        print_json(content)
        return
    if classes:
        console.out.print(console.classes_table(report))
    if confusion:
        console.out.print(console.confusion_table(report))
    console.out.print(result.told)


@app.command()
def predict(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, one of its checkpoints, or an exported model.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to tell of each image, at most all.")] = 5,
    as_json: Json = False,
) -> None:
    """Tell what a trained model takes images for."""
    import torch

    from prelora_ray.terminal import console

    model = prelora_ray.load(source)
    if torch.cuda.is_available():
        model.module.to("cuda")
    predictions = model.predict(images, top)
    if as_json:
        told = [{"image": image, **asdict(prediction)} for image, prediction in zip(images, predictions, strict=True)]
        print_json({"predictions": told})
        return
    console.out.print(console.predictions_table(images, predictions))


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A run folder, or one of its checkpoints.")],
    out: Annotated[str, typer.Argument(help="New folder that the exported model goes into.")],
    data: Annotated[str | None, typer.Option(help="Prepared images to compare over; default: those of the run.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Export the averaged weights of train.ema instead.")] = False,
    as_json: Json = False,
) -> None:
    """Export a run's model for timm, PEFT and ONNX, or transformers, each loaded and compared with the run's own."""
    from prelora_ray.terminal import console

    exported = prelora_ray.export(source, out, data, ema=ema)
    if as_json:
        forms = ("transformers", "adapter") if "transformers" in exported.forms else ("timm", "adapter", "onnx")
        paths = {form: f"{out.rstrip('/')}/{form}" if form in exported.forms else None for form in forms}
        print_json({**paths, "max_abs_diff": max(exported.max_abs_diff.values()), "images": exported.images})
        return
    for form, difference in exported.max_abs_diff.items():
        over = counted(exported.images, "real sequence" if "transformers" in exported.forms else "real image")
        console.out.print(f"{out.rstrip('/')}/{form}: logits differ by at most {difference:.2g} over {over}")
    console.out.print(f"{out.rstrip('/')}/README.md is the model's card, with code that runs each")


@app.command()
def replay(
    source: Annotated[str, typer.Argument(help="A run folder, or a norms.jsonl.")],
    tau: Annotated[
        str | None, typer.Option(help="Largest norm change, in percent; several as 0.25,0.5 or FROM:TO:COUNT.")
    ] = None,
    zeta: Annotated[str | None, typer.Option(help="Largest loss change, in percent; several likewise.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows that the test looks at (k).")] = None,
    window_epochs: Annotated[int | None, typer.Option(help="Epochs in a window (m).")] = None,
    norm_statistic: Annotated[Literal["last", "mean"] | None, typer.Option(help="A window's norm.")] = None,
    r_min: Annotated[int | None, typer.Option(help="Smallest rank.")] = None,
    r_max: Annotated[int | None, typer.Option(help="Largest rank.")] = None,
    normalize: Annotated[Literal["family", "overall"] | None, typer.Option(help="Over what changes are normalised.")] = None,
    ramp_epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs of the learning-rate ramp, in which no verdict is taken.")
    ] = None,
    picture: Annotated[str | None, typer.Option(help="An HTML file for pictures over several tau and zeta.")] = None,
    as_json: Json = False,
) -> None:
    """Tell where other settings of the test would have switched a recorded run. What is not given is the run's own."""
    from prelora_ray.recorded.replay import changed_method, read_record
    from prelora_ray.recorded.replay import replay as run
    from prelora_ray.storage import check_out_file
    from prelora_ray.summaries import rank_counts
    from prelora_ray.terminal import console

    check_out_file("--picture", picture)
    if picture is not None:
        check_installed("--picture", "report", "plotly")
    record = read_record(source)
    taus = [record.method.tau] if tau is None else _numbers("--tau", tau)
    zetas = [record.method.zeta] if zeta is None else _numbers("--zeta", zeta)
    given: dict[str, Any] = {"windows": windows, "window_epochs": window_epochs, "norm_statistic": norm_statistic}
    given |= {"tau": None if tau is None else taus[0], "zeta": None if zeta is None else zetas[0]}
    given |= {"r_min": r_min, "r_max": r_max, "normalize": normalize}
    method = changed_method(record, {key: value for key, value in given.items() if value is not None})
    ramp = record.ramp_epochs if ramp_epochs is None else ramp_epochs
    if len(taus) * len(zetas) > 1:
        _replay_map(source, record, method, ramp, taus, zetas, picture, as_json)
        return
    if picture is not None:
        raise UserError(f"--picture {picture} is not allowed: it takes several values of --tau or --zeta, such as 0.1:10:30")
    result = run(record, method, ramp)
    if as_json:
        keys = ("switch_window", "switch_epoch", "rate_left", "ranks", "reason", "note")
        print_json({key: getattr(result, key) for key in keys})
        return
    console.out.print(console.replay_table(result))
    if result.ranks is None:
        console.out.print(f"no switch: {result.reason}")
    else:
        told = modules_by_rank(rank_counts(result.ranks))
        left = "" if result.rate_left is None else f", {result.rate_left:.1%} of the learning rate's sum left"
        console.out.print(f"switch after epoch {result.switch_epoch} (window {result.switch_window}{left}): {told}")
    if result.note is not None:
        console.out.print(result.note)


def _replay_map(
    source: str,
    record: Record,
    method: MethodSettings,
    ramp_epochs: int,
    taus: list[float],
    zetas: list[float],
    picture: str | None,
    as_json: bool,
) -> None:
    from prelora_ray.sweep.map import PUBLISHED, switch_map, what_it_means
    from prelora_ray.terminal import console

    points = switch_map(record, method, ramp_epochs, taus, zetas, what_it_means(source, method))
    if picture is not None:
        from prelora_ray.report.page import write_switch_map

        rows = [points[row * len(zetas) : (row + 1) * len(zetas)] for row in range(len(taus))]
        titles = {"switch_epoch": "switch after epoch", "rate_left": "share of the learning rate's sum left"}
        titles |= {"trainable_fraction": "share that lora trains", "hours": "hours"}
        maps = {title: [[getattr(point, key) for point in row] for row in rows] for key, title in titles.items()}
        marks = {"this run": (record.method.tau, record.method.zeta), **PUBLISHED}
        write_switch_map(taus, zetas, maps, picture, marks)
    if as_json:
        print_json({"settings": [asdict(point) for point in points], "picture": picture})
        return
    console.out.print(console.switch_map_table(points))
    if picture is not None:
        console.out.print(f"{picture}: pictures over tau and zeta")


def _numbers(option: str, text: str) -> list[float]:
    """`0.5`; `0.25,0.5,1`; or `0.1:10:30`, so many evenly spaced in their logarithm."""
    try:
        if ":" in text:
            low, high, count = text.split(":")
            first, ratio, steps = float(low), float(high) / float(low), int(count) - 1
            if first <= 0 or ratio <= 1 or steps < 1:
                raise ValueError(text)
            values = [first * ratio ** (step / steps) for step in range(steps + 1)]
        else:
            values = [float(part) for part in text.split(",")]
        if not all(0 <= value < math.inf for value in values):
            raise ValueError(text)
        return values
    except (ValueError, ArithmeticError):
        raise UserError(
            f"{option} {text} is not allowed: give a number of 0 or more, several such as 0.25,0.5,1, or 0.1:10:30 for 30 "
            "from 0.1 to 10"
        ) from None


@app.command()
def report(
    paths: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or one sweep's folder.")],
    out: Annotated[str, typer.Option(help="The HTML file.")] = "report.html",
    png: Annotated[str | None, typer.Option(metavar="FOLDER", help="Also draw each figure as a picture into a folder.")] = None,
    plotly: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep the 5 MB that draw figures in a file that many reports share.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what happened in a run, in several side by side, or in a sweep, as one HTML file."""
    check_installed("prelora report", "report", "plotly", *(["kaleido"] if png is not None else []))

    from prelora_ray.report.page import write_report
    from prelora_ray.storage import check_local, check_out_file, check_out_folder
    from prelora_ray.terminal import console

    check_out_file("--out", out)
    check_out_file("--plotly", plotly)
    if png is not None:
        check_local(png)
        check_out_folder(png)
    figures = write_report(paths, out, png, plotly)
    if as_json:
        print_json({"path": out, "figures": figures, "png": png})
    else:
        console.out.print(f"{out}: {counted(len(figures), 'figure')}" + (f", as pictures in {png}" if png else ""))


@app.command()
def models(
    pattern: Annotated[str | None, typer.Argument(help="A timm model's name, or a pattern such as 'swin*'.")] = None,
    as_json: Json = False,
) -> None:
    """Tell which kinds of timm's models can be trained; with PATTERN, which of those can, and why others cannot."""
    from prelora_ray.method.architecture import ARCHITECTURES
    from prelora_ray.terminal import console

    if pattern is None:
        if as_json:
            print_json({"architectures": [asdict(architecture) for architecture in ARCHITECTURES]})
        else:
            console.out.print(console.architectures_table())
        return
    from prelora_ray.engine.known_models import known_models

    found = known_models(pattern)
    if as_json:
        print_json({"models": [asdict(model) for model in found]})
        return
    for model in found:
        told = model.reason or f"{counted(model.blocks, 'block')}, method.targets {', '.join(model.targets)}"
        console.out.print(f"{model.name}: {told}")


@app.command()
def runs(
    storage: Annotated[str, typer.Argument(help="Folder or bucket that holds run folders; also a sweep's folder.")] = "runs",
    as_json: Json = False,
) -> None:
    """List runs: what each does, how far it is, and when it last said so."""
    from prelora_ray.recorded.runs import list_runs
    from prelora_ray.terminal import console

    found = list_runs(storage)
    if as_json:
        print_json({"storage": storage, "runs": [asdict(run) for run in found]})
        return
    console.out.print(console.runs_table(storage, found))


@app.command()
def doctor(
    path: Annotated[
        str | None,
        typer.Argument(help="A prepared folder, or a run folder; with --cluster, a folder or bucket that all nodes must see."),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at the nodes of the Ray that RAY_ADDRESS names instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look for damage: are checksums right, can every image, record and checkpoint be read? Exit status 1 if not.

    With --cluster: have all nodes the same versions, clocks that agree, memory, open files, and the shared folder?
    """
    from prelora_ray.terminal import console

    if cluster:
        from prelora_ray.cluster_doctor import examine_cluster
        from prelora_ray.ray_session import ray_session

        if not os.environ.get("RAY_ADDRESS"):
            raise UserError("prelora doctor --cluster needs RAY_ADDRESS, the cluster's address, such as 10.0.0.1:6379, or auto")
        with ray_session(debug=_debug):
            nodes, findings = examine_cluster(path)
        content = {"path": path, "nodes": [asdict(node) for node in nodes], "findings": findings}
        looked_at = counted(len(nodes), "node")
    elif path is None:
        raise UserError("prelora doctor needs a prepared folder or a run folder, or --cluster")
    else:
        from prelora_ray.doctor import examine

        with console.progress("looked at") as show:
            findings = examine(path, show)
        content, looked_at = {"path": path, "findings": findings}, path
    if as_json:
        print_json(content)
    else:
        for finding in findings:
            console.out.print(finding)
        console.out.print(f"{looked_at}: {counted(len(findings), 'finding') if findings else 'no findings'}")
    if findings:
        raise typer.Exit(1)


class _StandardError(logging.Handler):
    """Writes to what standard error is at the moment: a live view puts itself there, to show lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def main() -> None:
    """Runs the command. Exit status 0; 1 the work failed; 2 the request was wrong; 130 interrupted.

    Any other error is the program's own: it comes out with its traceback, and exit status 1.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StandardError()])
    logging.getLogger("prelora_ray").setLevel(logging.INFO)
    if "--debug" in sys.argv:  # wherever it stands
        sys.argv = [sys.argv[0], "--debug", *(argument for argument in sys.argv[1:] if argument != "--debug")]
    try:
        app(prog_name="prelora")
    except (UserError, WorkError, OSError, InterruptedRunError, KeyboardInterrupt) as error:
        if _debug:
            raise
        print(f"prelora: {'interrupted' if isinstance(error, KeyboardInterrupt) else error}", file=sys.stderr)
        if isinstance(error, UserError):
            sys.exit(2)
        sys.exit(1 if isinstance(error, (WorkError, OSError)) else 130)
