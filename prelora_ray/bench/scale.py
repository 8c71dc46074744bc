"""What the parts of a run cost by its number of workers: a rehearsal of a large run on one machine.

The run is real (Ray Train, the worker loop, records, checkpoints, metrics, rank 0's requests), on nodes that are
raylets of this machine. The arithmetic of training is taken out: a tiny model, images that are made up, and gradients
that stay where they are, as their exchange is what `prelora bench network` measures.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster

from prelora_ray.bench.growth import Growth, fit
from prelora_ray.bench.machine import INTERRUPTED, describe
from prelora_ray.bench.parts import Costs, Sample, Span, costs
from prelora_ray.bench.processes import available_memory, cpu_seconds, usages
from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch, Pass, StreamPlan
from prelora_ray.data.manifest import Split
from prelora_ray.data.prepare import prepare
from prelora_ray.engine.exchange import Exchange
from prelora_ray.environment import environment
from prelora_ray.errors import InterruptedRunError, UserError, WorkError
from prelora_ray.fault_tolerance.ray_private import in_process_groups_of_their_own
from prelora_ray.ray_session import ray_session
from prelora_ray.train import batch_stream
from prelora_ray.train.run import train
from prelora_ray.train.worker import train_worker

logger = logging.getLogger(__name__)

WORKERS = (8, 16, 32, 64)
FAR = 512
"""Workers that growth is extrapolated to."""
_WORKER_BYTES = 450 * 2**20
"""What a worker takes with its share of a node, before any has been measured."""
_SPARE_BYTES = 3 * 2**29
_START_SECONDS = 600
"""That a process may take to start: on few cores, many start at once."""
_LEAST = {"cpu_ms": 0.1, "packets": 1.0, "bytes": 1000.0}
"""A part that takes less with any number of workers has no row."""
_IMAGE_SIZE = 8


@dataclass(frozen=True)
class Options:
    workers: tuple[int, ...] = WORKERS
    workers_per_node: int = 8
    seconds: int = 20
    """Steps that are a second apart."""
    steps: int = 200
    """One after the other."""
    epochs: int = 20
    """Of one step each, half a second apart."""

    def nodes(self, workers: int) -> int:
        return -(-workers // self.workers_per_node)


@dataclass(frozen=True)
class Stage:
    """Epochs of a run that are alike. A sample is taken where a stage begins."""

    epochs: int
    steps: int
    """Of each epoch."""
    pause: float
    """Seconds before each step."""


def stages(options: Options) -> list[Stage]:
    """First steps; then what tells a second, a step and an epoch apart; and the stage that a worker dies in."""
    return [
        Stage(1, 5, 0.0),
        Stage(1, options.seconds, 1.0),
        Stage(1, options.steps, 0.0),
        Stage(options.epochs, 1, 0.5),
        Stage(1, 2, 2.0),
    ]


def bench_scale(options: Options) -> dict[str, Any]:
    """Rehearses a run of each number of workers that this machine has memory for; `rows`, as JSON can hold them.

    A row is what a part of the run takes (`measured`) for each second, step, epoch, start, restart or process
    (`each`), by number of workers, and how it grows. `missing` says what there was no memory for, `failed` what ended
    the benchmark before its last row. Raises UserError where the system does not count as Linux does.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(f"prelora bench scale is not allowed on {sys.platform}: it needs what Linux counts of processes")
    measured: dict[int, Costs] = {}
    missing, failed, each = {}, None, _WORKER_BYTES
    with tempfile.TemporaryDirectory() as folder:
        with ray_session():
            prepare("digits", f"{folder}/data")
        try:
            for workers in sorted(set(options.workers)):
                needed, free = each * workers + _SPARE_BYTES, available_memory()
                if needed > free:
                    gib = f"{needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
                    missing[f"{workers} workers"] = f"they need about {gib}"
                    continue
                logger.info("%d workers on %d nodes", workers, options.nodes(workers))
                samples = _rehearse(options, workers, folder)
                measured[workers] = _costs(samples, options, workers)
                each = sum(process.memory for process in samples[-1].processes.values()) // workers
        except WorkError as error:
            failed = str(error)
        except (InterruptedRunError, KeyboardInterrupt):
            failed = INTERRUPTED
    return {
        "benchmark": "scale",
        **describe(torch.device("cpu")),
        "options": asdict(options),
        "far": FAR,
        "rows": _rows(measured),
        "missing": missing,
        "failed": failed,
    }


def _rows(measured: dict[int, Costs]) -> list[dict[str, Any]]:
    """One for each figure, with None for a number of workers that has no such part."""
    rows = []
    for figure in dict.fromkeys(figure for found in measured.values() for figure in found):
        values = {workers: found[figure] for workers, found in measured.items() if figure in found}
        if max(values.values()) < _LEAST.get(figure[2], 0.0):
            continue
        by_workers = {f"{workers}_workers": values.get(workers) for workers in measured}
        rows.append({**dict(zip(("name", "each", "measured"), figure, strict=True)), **by_workers, **_growth(figure, values)})
    return sorted(rows, key=lambda row: row["name"])


def _growth(figure: tuple[str, str, str], values: dict[int, float]) -> dict[str, float | None]:
    """None for what starts: on one machine all wait for its cores, so that would be the growth of a queue."""
    extrapolated = f"extrapolated_to_{FAR}"
    if figure[1] in ("start", "restart"):
        return dict.fromkeys((*(field.name for field in fields(Growth)), extrapolated))
    growth = fit(list(values), list(values.values()))
    return {**asdict(growth), extrapolated: growth.at(FAR)}


def _costs(samples: Sequence[Sample], options: Options, workers: int) -> Costs:
    begin, *marks, death, end = samples
    told = stages(options)[1:-1]
    spans = [
        Span(before, after, stage.epochs * stage.steps, stage.epochs)
        for stage, before, after in zip(told, marks[1:-1], marks[2:], strict=True)
    ]
    return costs(Span(begin, marks[0]), spans, Span(death, end), workers, options.nodes(workers))


def _rehearse(options: Options, workers: int, folder: str) -> list[Sample]:
    """Runs a run of so many workers: samples before it, at the begin of each stage, at the death, and behind
    the restart. What had been used at the death is taken for what had been as its stage began."""
    own, run = Path(folder, str(workers)), stages(options)
    own.mkdir()
    with _cluster(options.nodes(workers), options.workers_per_node):
        before = Sample(time.time(), os.getpid(), 0, usages(os.getpid()))
        settings = _settings(f"{folder}/data", str(own), workers, sum(stage.epochs for stage in run))
        train(settings, loop=_Loop(tuple(run), os.getpid(), str(own)))
    samples = [Sample.from_json(line) for line in Path(own, "samples.jsonl").read_text().splitlines()]
    if len(samples) != len(run) + 1:
        raise WorkError(f"the run of {workers} workers went through {len(samples)} of the {len(run) + 1} moments looked at")
    death = replace(samples[-2], time=float(Path(own, "death").read_text()))
    return [before, *samples[:-1], death, samples[-1]]


@contextmanager
def _cluster(nodes: int, workers: int) -> Iterator[None]:
    """A head without room for workers and nodes with room for `workers` each, which a run takes, for the time of the
    block."""
    own = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_SECONDS)}
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder,  # a socket's path is short
        environment(own | {"RAY_TMPDIR": folder}),
        ExitStack() as stack,
    ):
        system = {"worker_register_timeout_seconds": _START_SECONDS}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": system}
        with in_process_groups_of_their_own():
            cluster = Cluster(initialize_head=True, head_node_args=head)
            stack.callback(cluster.shutdown)
            for _ in range(nodes):
                cluster.add_node(wait=False, num_cpus=workers)
        cluster.wait_for_nodes(_START_SECONDS)
        with environment({"RAY_ADDRESS": cluster.address}):
            yield


def _settings(data: str, storage: str, workers: int, epochs: int) -> Settings:
    return parse_settings(
        {
            "name": "rehearsal",
            "storage": storage,
            "data": {"path": data, "batch_size": workers, "cell": 1},
            "model": {
                "name": "vit_tiny_patch16_224",
                "image_size": _IMAGE_SIZE,
                "options": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
            },
            "train": {"epochs": epochs, "ramp_epochs": 1, "validate_every": epochs},
            "method": {"tau": 1e-9, "r_max": 8},
            "checkpoint": {"every_seconds": None},
            "workers": {"min": workers, "max": workers, "gpu": False, "hang_seconds": _START_SECONDS},
        }
    )


@dataclass(frozen=True)
class _Loop:
    """What each worker runs: the loop of a run, on batches that come as the stages have them."""

    run: tuple[Stage, ...]
    driver: int
    """Process number."""
    folder: str

    def __call__(self, config: dict[str, Any]) -> None:
        batch_stream.stream_batches = self._batches  # type: ignore[assignment]  # of this process, which ends with the run
        Exchange.of = lambda number_format: Exchange(_stay)  # type: ignore[method-assign]
        train_worker(config)

    def _batches(self, plan: StreamPlan, passes: Sequence[Pass], decoders: int) -> Iterator[Batch]:
        is_first = passes[0].epoch == 0
        sampler = _Sampler(Path(self.folder, "samples.jsonl"), self.driver) if plan.rank == 0 else None
        kinds = [(stage, epoch) for stage in self.run for epoch in range(stage.epochs)]
        taken = 0
        for split, epoch, _ in passes:
            stage, of_stage = kinds[epoch]
            for step in range(stage.steps if split == "train" else 1):
                begins = is_first and of_stage == step == 0 and split == "train"
                if sampler is not None and (begins or (not is_first and taken == 1)):
                    sampler.sample()
                time.sleep(stage.pause)
                if begins and stage == self.run[-1] and plan.rank == plan.world_size - 1:
                    Path(self.folder, "death").write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)
                taken += 1
                yield _batch(plan, split, epoch)


class _Sampler:
    """Writes down, in rank 0's process, what all have used. What rank 0 itself spends on that is not counted."""

    def __init__(self, path: Path, driver: int) -> None:
        self._path = path
        self._driver = driver
        self._spent = 0.0

    def sample(self) -> None:
        own, start = os.getpid(), time.thread_time()
        now, cpu = time.time(), cpu_seconds(own) - self._spent
        found = usages(self._driver)
        found[own] = replace(found[own], cpu=cpu)
        with open(self._path, "a") as file:
            print(Sample(now, self._driver, own, found).to_json(), file=file)
        self._spent += time.thread_time() - start


def _batch(plan: StreamPlan, split: Split, epoch: int) -> Batch:
    slots, size = plan.num_slots, _IMAGE_SIZE
    tensors = {"images": torch.zeros(slots, size, size, 3, dtype=torch.uint8), "labels": torch.zeros(slots).long()}
    return Batch(split, epoch, 0, tensors, np.arange(slots))


def _stay(group: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """In place of an exchange: each worker's gradients stay its own."""
    del group
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
