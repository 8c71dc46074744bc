"""`prelora bench`: the options of each benchmark, and how its result is told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prelora_ray.errors import InterruptedRunError, WorkError
from prelora_ray.extras import check_installed
from prelora_ray.json_output import Json, print_json
from prelora_ray.storage import absolute, check_out_file

app = typer.Typer(help="Measure speed on this machine, beside what others take for the same work.", no_args_is_help=True)
ModelName = Annotated[str, typer.Option(help="A Vision Transformer's name in timm.")]
ImageSize = Annotated[int, typer.Option(min=1, help="Side of the image, in pixels.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
UsualModel = Annotated[str | None, typer.Option(help="A ViT's name in timm; default: ViT-L, on a CPU ViT-Ti.")]
UsualImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the image; default: 224, on a CPU 64.")]
Out = Annotated[str | None, typer.Option(help="Also write the JSON object to this file.")]


@app.command("phases")
def _phases(
    model: UsualModel = None,
    image_size: UsualImageSize = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in a step; default: 256, on a CPU 8.")] = None,
    residual: Annotated[Literal["fp32", "bf16"], typer.Option(help="Format of our rows' residual stream.")] = "fp32",
    drop_path: Annotated[float, typer.Option(min=0, max=1, help="Also measure this drop path, as masks and as subsets.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a round; a figure is the median of five rounds.")] = 10,
    kernels: Annotated[int, typer.Option(help="Name so many kernels of each row, those that take the most time.")] = 0,
    row: Annotated[list[str] | None, typer.Option(help="Beginning of the names of rows to measure; repeatable.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Images a second in full, warmup and lora, and of timm, PEFT and Hugging Face."""
    from prelora_ray.bench.phases import Options
    from prelora_ray.bench.phases import bench_phases as run

    size = _size(model, image_size, batch, batch_on_cpu=8)
    options = Options(**size, residual=residual, drop_path=drop_path, steps=steps, kernels=kernels, rows=tuple(row or ()))
    _measure(lambda: run(options), out, as_json)


@app.command("network")
def _network(
    model: UsualModel = None,
    image_size: UsualImageSize = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images of each worker; default: 256, on a CPU 8.")] = None,
    workers: Annotated[int, typer.Option(min=2, help="Processes, each with a GPU of its own.")] = 2,
    bandwidth: Annotated[
        list[float] | None, typer.Option(min=0.001, help="Gbit/s of a worker's link; repeatable. Default: 100, 25, 10, 5, 1.")
    ] = None,
    bucket: Annotated[int | None, typer.Option(min=1, help="MiB exchanged at once; default: torch's 25.")] = None,
    residual: Annotated[Literal["fp32", "bf16"], typer.Option(help="Format of the residual stream.")] = "fp32",
    seconds: Annotated[float, typer.Option(min=0, help="To measure a row for; it takes one step at least.")] = 2.0,
    row: Annotated[list[str] | None, typer.Option(help="Beginning of the names of rows to measure; repeatable.")] = None,
    picture: Annotated[str | None, typer.Option(help="Also draw the rows into this HTML file.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time of a step by phase against the bandwidth between workers, which is simulated behind their own exchange."""
    from prelora_ray.bench.network import BANDWIDTHS, Options
    from prelora_ray.bench.network import bench_network as run

    size = _size(model, image_size, batch, batch_on_cpu=8)
    bandwidths, rows = tuple(bandwidth or BANDWIDTHS), tuple(row or ())
    options = Options(
        **size, workers=workers, bandwidths=bandwidths, bucket=bucket, residual=residual, seconds=seconds, rows=rows
    )
    _measure(lambda: run(options), out, as_json, picture)


@app.command("memory")
def _memory(
    model: Annotated[list[str] | None, typer.Option(help="A ViT's name in timm; repeatable. Default: ViT-S, B and L.")] = None,
    image_size: ImageSize = 224,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images in a step; repeatable. Default: 256, 512.")] = None,
    micro_batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images at once; repeatable. Default: 64, 128, 256.")
    ] = None,
    residual: Annotated[Literal["fp32", "bf16"], typer.Option(help="Format of the residual stream.")] = "fp32",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Peak of a GPU's memory in full, warmup and lora, over models, batches and micro-batches."""
    from prelora_ray.bench.memory import BATCHES, MICRO_BATCHES, MODELS, Options
    from prelora_ray.bench.memory import bench_memory as run

    sizes = tuple(batch or BATCHES), tuple(micro_batch or MICRO_BATCHES)
    options = Options(tuple(model or MODELS), image_size, *sizes, residual)
    _measure(lambda: run(options), out, as_json)


@app.command("data")
def _data(
    images: Annotated[int, typer.Option(min=100, help="Images in a pass.")] = 2000,
    image_size: ImageSize = 224,
    batch: BatchSize = 64,
    cores: Annotated[int | None, typer.Option(min=1, help="Decoding processes; default: one a core.")] = None,
    passes: Annotated[int, typer.Option(min=2, help="Passes over the images; the first one is not counted.")] = 3,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Decoded and augmented images a second and core, of our stream and of torch's DataLoader."""
    from prelora_ray.bench.data import Options
    from prelora_ray.bench.data import bench_data as run

    options = Options(images, image_size, batch, cores or os.cpu_count() or 1, passes)
    _measure(lambda: run(options), out, as_json)


@app.command("reading")
def _reading(
    images: Annotated[int, typer.Option(min=1, help="Images of 34 kB, which are read once for each row.")] = 16_384,
    latency: Annotated[float, typer.Option(min=0, help="Milliseconds that the bucket takes for a request.")] = 20.0,
    requests_per_second: Annotated[float, typer.Option(min=1, help="That the bucket of one of the rows allows.")] = 100.0,
    workers: Annotated[int, typer.Option(min=1, help="That the reader is one of in one of the rows.")] = 16,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Images a second that a worker's reader gets from a bucket with a delay, and from a disk, without decoding."""
    from prelora_ray.bench.reading import Options
    from prelora_ray.bench.reading import bench_reading as run

    _measure(lambda: run(Options(images, latency, requests_per_second, workers)), out, as_json)


@app.command("loop")
def _loop(
    model: UsualModel = None,
    image_size: UsualImageSize = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in a step; default: 256, on a CPU 128.")] = None,
    epochs: Annotated[int, typer.Option(min=2, help="Epochs of 12 steps; the first one is not counted.")] = 6,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Images a second of our loop under Ray, against the same steps in a bare loop."""
    from prelora_ray.bench.run import Options
    from prelora_ray.bench.run import bench_loop as run

    size = _size(model, image_size, batch, batch_on_cpu=128)
    _measure(lambda: run(Options(**size, epochs=epochs)), out, as_json)


@app.command("restart")
def _restart(
    model: ModelName = "vit_tiny_patch16_224",
    image_size: ImageSize = 64,
    batch: BatchSize = 128,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Seconds from the command to the first step, with an empty compile cache and with a filled one."""
    from prelora_ray.bench.run import Options
    from prelora_ray.bench.run import bench_restart as run

    _measure(lambda: run(Options(model, image_size, batch)), out, as_json)


@app.command("checkpoint")
def _checkpoint(
    model: ModelName = "vit_base_patch16_224",
    image_size: ImageSize = 224,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 256,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint costs the steps that go on while it is written."""
    from prelora_ray.bench.checkpoint import bench_checkpoint as run

    _measure(lambda: run(model, image_size, batch), out, as_json)


@app.command("prepare")
def _prepare(
    images: Annotated[int, typer.Option(min=16, help="Images to prepare.")] = 8192,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Images a second and core of `prelora prepare`, and of a plain process pool that does the same work."""
    from prelora_ray.bench.prepare import bench_prepare as run

    _measure(lambda: run(images), out, as_json)


@app.command("exporter")
def _exporter(
    workers: Annotated[int, typer.Option(min=1, help="Workers that send.")] = 64,
    seconds: Annotated[int, typer.Option(min=2, help="Messages of each worker, one a second.")] = 20,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """How long a message to the metrics' exporter holds up a worker, and how long a scrape takes."""
    from prelora_ray.bench.exporter import bench_exporter as run

    _measure(lambda: run(workers, seconds), out, as_json)


@app.command("scale")
def _scale(
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Workers; repeatable. Default: 8, 16, 32, 64.")] = None,
    workers_per_node: Annotated[int, typer.Option(min=1, help="Workers on one node, which is a raylet.")] = 8,
    seconds: Annotated[int, typer.Option(min=1, help="Steps that are a second apart.")] = 20,
    steps: Annotated[int, typer.Option(min=2, help="Steps one after the other.")] = 200,
    epochs: Annotated[int, typer.Option(min=2, help="Epochs of one step each.")] = 20,
    picture: Annotated[str | None, typer.Option(help="Also draw the growth into this HTML file.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What each part of a run costs by its number of workers, all of them on this machine, and a worker's death."""
    from prelora_ray.bench.scale import WORKERS, Options
    from prelora_ray.bench.scale import bench_scale as run

    options = Options(tuple(workers or WORKERS), workers_per_node, seconds, steps, epochs)
    _measure(lambda: run(options), out, as_json, picture)


@app.command("rehearsal")
def _rehearsal(out: Out = None, as_json: Json = False) -> None:
    """What the size of ImageNet-1k and 21k costs beside its images, with made-up manifests."""
    from prelora_ray.bench.rehearsal import bench_rehearsal as run

    _measure(run, out, as_json)


@app.command("records")
def _records(
    epochs: Annotated[list[int] | None, typer.Option(min=1, help="Of a run; repeatable. Default: 100, 300, 1000.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Bytes that the records of long runs come to in a bucket, with segments and without."""
    from prelora_ray.bench.records import bench_records as run

    _measure(lambda: run(tuple(epochs or (100, 300, 1000))), out, as_json)


def _size(model: str | None, image_size: int | None, batch: int | None, *, batch_on_cpu: int) -> dict[str, Any]:
    from prelora_ray.bench.machine import usual_size

    given = {"model": model, "image_size": image_size, "batch": batch}
    return usual_size(batch_on_cpu) | {key: value for key, value in given.items() if value is not None}


def _measure(run: Callable[[], dict[str, Any]], out: str | None, as_json: bool, picture: str | None = None) -> None:
    from prelora_ray.bench.machine import INTERRUPTED
    from prelora_ray.terminal import console

    check_out_file("--out", out)
    check_out_file("--picture", picture)
    if picture is not None:
        check_installed("--picture", "report", "plotly")
    result = run()
    if as_json:
        print_json(result)
    else:
        console.out.print(console.bench_table(result))
        for row in result["rows"]:
            for kernel, milliseconds in row.get("kernels", ()):
                console.out.print(f"{row['name']}: {milliseconds:8.3f} ms  {kernel[:110]}")
    if out is not None:
        Path(absolute(out)).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if picture is not None and result["rows"]:
        from prelora_ray.report import page

        (page.write_scale if result["benchmark"] == "scale" else page.write_network)(result, picture)
    elif picture is not None:
        print(f"{picture} was not written: nothing was measured", file=sys.stderr)
    for name, reason in result.get("missing", {}).items():
        print(f"not measured: {name} ({reason})", file=sys.stderr)
    if (failed := result.get("failed")) is not None:
        kind = InterruptedRunError if failed == INTERRUPTED else WorkError
        raise kind(f"the benchmark ended before its last row: {failed}")
