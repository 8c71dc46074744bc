"""Two workers of which one is slow: who waits for whom, by the metrics, the run's records, and what is said of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prelora_ray.data.batch import Batch
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.monitor.telemetry import WorkerTelemetry
from prelora_ray.summaries import Slowness, slowness
from prelora_ray.train import batch_stream
from prelora_ray.train.batch_stream import BatchStream, stream_plan
from prelora_ray.train.epoch_meter import EpochMeter
from tests.engine.test_exchange import WORKERS, join, start
from tests.engine.test_step import IDS, MANIFEST, batch, settings
from tests.lines import epoch_line

STEPS = 10
SLEEP = 0.1
"""Seconds that one worker sleeps in each step."""


def train_beside_another(rank: int, folder: Path, slow: int, cause: str) -> None:
    join(rank, folder)
    run = settings(folder)
    run = run.model_copy(update={"monitor": run.monitor.model_copy(update={"enabled": False})})
    plan = stream_plan(run, MANIFEST, rank, WORKERS)
    state = TrainState(run, 10, plan.orders["train"].num_batches, torch.device("cpu"), WORKERS)
    step = TrainStep(state, plan)
    own = batch(IDS[rank * plan.num_slots :][: plan.num_slots])

    def batches() -> Iterator[Batch]:
        for _ in range(STEPS):
            time.sleep(SLEEP if (rank, cause) == (slow, "data") else 0.0)
            yield own

    if (rank, cause) == (slow, "compute"):
        state.model.blocks[0].register_forward_hook(lambda *_: time.sleep(SLEEP))
    batch_stream.stream_batches = lambda *_: batches()
    batch_stream._decoders = lambda *_: 1
    stream = BatchStream(run, plan, (0, 0), WORKERS)
    telemetry = WorkerTelemetry(run, 10, rank, WORKERS, torch.device("cpu"))
    meter = EpochMeter(state, plan, stream, step.exchange_clock)
    telemetry.begin_epoch(meter.phase, state.image_size)
    for taken in stream.take("train", 0):
        step.train(taken)
        telemetry.step(1, meter.wait_seconds, step.exchange_clock.seconds)
    loss, images = step.epoch_sums()
    meter.end_training(loss, images, images)
    samples = [sample for metric in telemetry._metrics.collect() for sample in metric.samples]
    exported = {sample.name: sample.value for sample in samples if sample.labels.get("worker") == str(rank)}
    line = meter.line(0, [], 0.1)
    (folder / f"found-{rank}.json").write_text(json.dumps([exported, line.worker_seconds]))


@pytest.mark.parametrize(("slow", "cause"), [pytest.param(1, "data", marks=pytest.mark.slow), (0, "compute")])
def test_the_slow_worker_is_named_with_its_cause(tmp_path: Path, slow: int, cause: str) -> None:
    start(train_beside_another, tmp_path, slow, cause)
    (exported, recorded), other = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (slow, 1 - slow))
    assert recorded == other[1], "rank 0 has what every worker measured"
    assert recorded[cause][slow] > recorded[cause][1 - slow]
    assert recorded["exchange"][1 - slow] > recorded["exchange"][slow]
    for values, rank in ((exported, slow), (other[0], 1 - slow)):
        assert values["prelora_exchange_seconds_total"] == pytest.approx(recorded["exchange"][rank])
        assert 0 < values["prelora_data_wait_seconds_total"] <= recorded["data"][rank]
        assert values["prelora_step_seconds_sum"] <= sum(of[rank] for of in recorded.values())
    lines = [epoch_line(epoch, worker_seconds=recorded, train_seconds=60.0) for epoch in range(3)]
    found = slowness(lines)
    assert found is not None
    assert (found.worker, found.cause) == (slow, cause)
    assert found.others is not None and found.share > found.others


SECONDS = {"data": [1.0, 1.0, 31.0, 1.0], "compute": [59.0, 59.0, 60.0, 59.0], "exchange": [40.0, 40.0, 9.0, 40.0]}


def test_slowness_by_hand() -> None:
    def told(**seconds: list[float]) -> Slowness | None:
        return slowness([epoch_line(epoch, worker_seconds=SECONDS | seconds, train_seconds=100.0) for epoch in (0, 1)])

    assert told() == Slowness(2, "data", 0.31, 0.01, 0.4)
    assert told(data=[1.0] * 4, compute=[59.0, 59.0, 90.0, 59.0]) == Slowness(2, "compute", 0.9, 0.59, 0.4)
    assert told(data=[1.0] * 4, exchange=[40.0] * 4, compute=[59.0] * 4) == Slowness(None, "exchange", 0.4, None, None)
    assert told(data=[1.0] * 4, exchange=[20.0] * 4, compute=[79.0] * 4) is None
    assert slowness([epoch_line(0, worker_seconds=SECONDS, train_seconds=100.0)]) is None, "it compiles"
    assert slowness([epoch_line(epoch, worker_seconds=SECONDS, train_seconds=20.0) for epoch in range(3)]) is None
    assert slowness([epoch_line(epoch, train_seconds=100.0) for epoch in range(3)]) is None, "an earlier version's"
    assert slowness([]) is None
    of_trunk = [epoch_line(0, attempt=-1, worker_seconds=SECONDS, train_seconds=100.0) for _ in range(3)]
    grown = epoch_line(0, attempt=-1, worker_seconds={kind: of[:2] for kind, of in SECONDS.items()}, train_seconds=100.0)
    assert slowness([*of_trunk, grown]) is None, "a fork has not trained yet"
