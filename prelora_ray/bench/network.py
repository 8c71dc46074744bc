"""Time of a step by phase against the bandwidth between workers: what freezing saves where gradients have far to go.

Every worker is a process, on a GPU of its own or with gloo on a CPU. They exchange their gradients with each other, and
a simulated link holds up each bucket behind that: what this machine's own exchange takes is in every row.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from prelora_ray.bench.link import Link
from prelora_ray.bench.machine import INTERRUPTED, check_rows, describe, missing_fp8, seconds_per_call
from prelora_ray.bench.own import OwnRun, own_settings
from prelora_ray.config import Settings
from prelora_ray.engine.check import check_model
from prelora_ray.engine.exchange import Exchange
from prelora_ray.engine.precision import has_fp8
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase

logger = logging.getLogger(__name__)

NumberFormat = Literal["fp32", "bf16"]
BANDWIDTHS = (100.0, 25.0, 10.0, 5.0, 1.0)
_FULL = "full"
_NUMBER_FORMATS: dict[str, tuple[NumberFormat, ...]] = {
    _FULL: ("fp32", "bf16"),
    "warmup": ("fp32", "bf16"),
    "lora": ("fp32",),
    "lora fp8": ("fp32",),
}
"""Those that gradients are exchanged in, by what computes them."""
_WARM_UP_STEPS = 4
"""At the begin of each phase: they compile."""
_ROUNDS, _MOST_STEPS = 5, 50
"""Of a row whose steps are short enough; a figure is the median of the rounds."""


@dataclass(frozen=True)
class Options:
    model: str
    image_size: int
    batch: int
    """Images of each worker in a step."""
    workers: int = 2
    bandwidths: tuple[float, ...] = BANDWIDTHS
    """Gbit/s of a worker's link, beside the exchange as it is."""
    bucket: int | None = None
    """MiB of gradients that DDP exchanges at once; None is torch's own."""
    residual: NumberFormat = "fp32"
    seconds: float = 2.0
    """That a row is measured for, or for one step."""
    rows: tuple[str, ...] = ()
    """Beginnings of the names of rows to measure; all where it is empty."""


@dataclass(frozen=True)
class Row:
    name: str
    phase: str
    gbit_per_second: float | None
    """Of a worker's link; None is the exchange as this machine makes it."""
    milliseconds: float
    """Of a step, by wall clock."""
    against_full: float | None
    """Multiple of the speed of full training with float32 gradients over the same link; None without that row."""
    link_milliseconds: float
    """That the simulated link was busy in a step, measured; much of it beside the backward."""
    exchanged_bytes: int
    """Of gradients that each worker gives to be summed in a step."""


def bench_network(options: Options) -> dict[str, Any]:
    """Measures every row in as many processes as workers; `rows` and what they ran on, as JSON can hold it.

    `failed` says what ended it before its last row, or is None. Raises UserError for a model that cannot work, for a
    row that there is not, and where there is not a GPU for each worker.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and torch.cuda.device_count() < options.workers:
        raise UserError(
            f"--workers {options.workers} is not allowed here: each needs a GPU of its own, and this machine has "
            f"{torch.cuda.device_count()}"
        )
    check_rows(options.rows, [_name(title, each) for title, formats in _NUMBER_FORMATS.items() for each in formats])
    check_model(_settings(options, "auto"))
    failed = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.touch()
        try:
            start_processes(_measure, (options, device.type, folder), nprocs=options.workers, start_method="spawn")
        except (ProcessRaisedException, ProcessExitedException) as error:  # what was measured stands
            logger.debug("", exc_info=True)
            failed = str(error).strip().splitlines()[-1]
        except KeyboardInterrupt:
            failed = INTERRUPTED
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        "benchmark": "network",
        **describe(device),
        "options": vars(options),
        "rows": rows,
        "missing": missing_fp8(device, "lora fp8"),
        "failed": failed,
    }


def _name(title: str, number_format: NumberFormat) -> str:
    return title if number_format == "fp32" else f"{title}, {number_format} exchange"


def _settings(options: Options, precision: Literal["auto", "fp8"]) -> Settings:
    train = {"precision": precision, "residual": options.residual}
    model = {"name": options.model, "image_size": options.image_size}
    return own_settings(model, options.batch * options.workers, options.batch, train)


def _measure(rank: int, options: Options, device_type: str, folder: str) -> None:
    """What one worker does; the first one writes the rows down."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if rank == 0:
        logging.basicConfig(format="%(message)s")
        logger.setLevel(logging.INFO)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=options.workers)
    with open(Path(folder, "rows.jsonl"), "a") as file:
        for row in _Worker(options, device, rank).rows():
            if rank == 0:
                print(json.dumps(vars(row)), file=file, flush=True)
                logger.info("%s: %.0f ms a step", row.name, row.milliseconds)
    dist.destroy_process_group()


class _Worker:
    def __init__(self, options: Options, device: torch.device, rank: int) -> None:
        self.options = options
        self.device = device
        self.rank = rank
        self.link = Link(device)
        self.full: dict[float | None, float] = {}
        """Seconds of a step of full training with gradients in float32, by Gbit/s."""

    def rows(self) -> Iterator[Row]:
        run = self._run("auto")
        for phase in Phase:
            yield from self._rows(run, phase, phase.value)
        if has_fp8(self.device):
            del run
            run = self._run("fp8")
            run.enter(Phase.WARMUP)
            yield from self._rows(run, Phase.LORA, "lora fp8")

    def _run(self, precision: Literal["auto", "fp8"]) -> OwnRun:
        exchange = Exchange(self.link.exchange, bucket_mb=self.options.bucket)
        settings, workers = _settings(self.options, precision), self.options.workers
        return OwnRun(settings, self.device, rank=self.rank, world_size=workers, exchange=exchange)

    def _rows(self, run: OwnRun, phase: Phase, title: str) -> Iterator[Row]:
        self.link.gbit_per_second = None
        run.enter(phase)
        names = {_name(title, number_format): number_format for number_format in _NUMBER_FORMATS[title]}
        wanted = [name for name in names if self._wanted(name)]
        if not wanted:
            return
        for _ in range(_WARM_UP_STEPS):
            run.step()
        for name in wanted:
            self.link.number_format = names[name]
            yield from self._rows_by_bandwidth(run, name, phase)

    def _wanted(self, name: str) -> bool:
        return not self.options.rows or any(name.startswith(row) for row in self.options.rows)

    def _rows_by_bandwidth(self, run: OwnRun, name: str, phase: Phase) -> Iterator[Row]:
        self.link.gbit_per_second = None
        self.link.reset()
        unhindered = self._seconds_per_step(run, calls=1, rounds=1)
        exchanged = self.link.num_bytes
        for gbit in (None, *self.options.bandwidths):
            self.link.gbit_per_second = gbit
            expected = max(unhindered, self.link.seconds(exchanged))
            steps = min(max(int(self.options.seconds / expected), 1), _MOST_STEPS)
            rounds = min(steps, _ROUNDS)
            self.link.reset()
            seconds = self._seconds_per_step(run, calls=steps // rounds, rounds=rounds)
            if name == _FULL:
                self.full[gbit] = seconds
            full = self.full.get(gbit)
            yield Row(
                f"{name}, {'no limit' if gbit is None else f'{gbit:g} Gbit/s'}",
                phase.value,
                gbit,
                seconds * 1e3,
                None if full is None else full / seconds,
                self.link.busy_seconds() * 1e3 / (steps // rounds * rounds),
                exchanged,
            )

    def _seconds_per_step(self, run: OwnRun, calls: int, rounds: int) -> float:
        """Of the slowest worker: all of them must come to the same number of steps."""
        seconds = torch.tensor(seconds_per_call(run.step, self.device, calls, rounds), device=self.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)
