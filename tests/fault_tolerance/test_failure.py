"""What a user reads of a failure, and which failures are retried: with Ray's own errors, and whole runs that fail."""

from __future__ import annotations

import os
import pickle
import shutil
import traceback
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from prelora_ray.config import Settings
from prelora_ray.engine.step import TrainStep
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.end import End, read_end
from prelora_ray.fault_tolerance.failure import WorkerCodeError, failures_of, is_own, own_failures, root_cause
from prelora_ray.fault_tolerance.ray_private import FailurePolicy
from prelora_ray.run_folder import RunFolder
from prelora_ray.train import checks
from prelora_ray.train import run as driver
from prelora_ray.train.run import TrainError, train
from prelora_ray.train.worker import train_worker
from tests.data.test_damage import overwrite
from tests.runs import at_mlflow, settings

SHAPES = "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"
ONCE = {"train": {"epochs": 2, "resolution": []}, "method": {"enabled": False}, "checkpoint": {"every_seconds": None}}
"""Settings of a run that never switches, and saves at the end of its two epochs alone."""


def raise_in_worker(config: dict[str, Any]) -> None:
    total, rank = torch.zeros(3), ray.train.get_context().get_world_rank()
    match config["kind"]:
        case "data":
            next(iter(ray.data.range(1).map(_fail_on_row).iter_rows()))  # of several rows any may fail first
        case "one of two":
            if rank == 1:
                raise ValueError("a first line\n  and a second")
            dist.all_reduce(total)
        case "death":
            dist.all_reduce(total)
            if rank == 1:
                os._exit(1)
            dist.all_reduce(total)


def _fail_on_row(row: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError(f"row {row['id']} is bad:\nit has no colour")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "workers", "told", "own"),
    [
        ("data", 1, "RuntimeError: row 0 is bad: it has no colour", True),
        ("one of two", 2, "ValueError: a first line and a second", True),
        ("death", 2, "ActorDiedError: The actor died unexpectedly before finishing this task.", False),
    ],
)
def test_the_root_cause_of_rays_errors(ray_cluster, tmp_path, kind, workers, told, own):
    trainer = ray.train.torch.TorchTrainer(
        raise_in_worker,
        train_loop_config={"kind": kind},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path)),
    )
    with pytest.raises(ray.train.TrainingFailedError) as error:
        trainer.fit()
    cause = root_cause(error.value)
    assert cause.startswith(told) and (cause == told or not own)
    assert "\n" not in cause
    failures = error.value.worker_failures.values()
    assert any(is_own(failure) for failure in failures) == own


def test_what_lost_peers_full_disks_and_devices_raise_is_not_the_codes_own():
    for error in (
        OSError(5, "Input/output error"),
        OSError(28, "No space left on device"),
        MemoryError(),
        dist.DistNetworkError("the store is gone"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access"),
        RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21396."),
        RuntimeError("NCCL Error 2: unhandled system error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ray.exceptions.ObjectLostError("00", None, ""),
    ):
        assert not is_own(error), error


LOST_PEER = RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21396.")
DEATH = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())


def test_of_several_workers_failures_the_one_that_caused_the_others_is_told():
    own = WorkerCodeError(f"RuntimeError: {SHAPES}", 3)
    assert root_cause(ray.train.WorkerGroupError("", {0: LOST_PEER, 1: own})) == own.reason
    assert root_cause(ray.train.WorkerGroupError("", {0: LOST_PEER, 1: DEATH})).startswith("ActorDiedError: The actor died")
    assert failures_of(ray.train.WorkerGroupError("", {0: LOST_PEER, 1: own})) == [own]
    assert failures_of(ray.train.WorkerGroupError("", {0: own, 1: DEATH})) == []  # its peer's death may have caused it


def test_no_traceback_is_told(ray_cluster):
    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise TypeError("in a task")

    with pytest.raises(TypeError) as error:
        ray.get(fail.remote())
    assert root_cause(error.value) == "TypeError: in a task"
    assert is_own(error.value)
    try:
        {}["colour"]
    except KeyError:
        quoted = RuntimeError(f"a loader failed, with its own\n{traceback.format_exc()}")
    assert root_cause(quoted) == "KeyError: 'colour'"


@pytest.mark.parametrize(
    ("error", "reason", "is_final"),
    [
        (UserError("train.x = 1 is not allowed: it must be 2;\na connection is none"), "train.x = 1 is not allowed: ", True),
        (ValueError("too many values to unpack"), "ValueError: too many values to unpack", False),
    ],
)
def test_a_users_mistake_is_final_and_a_slip_of_the_program_is_not(error, reason, is_final):
    with pytest.raises(WorkerCodeError) as told, own_failures(lambda: 3):
        raise error
    assert (told.value.is_final, told.value.step) == (is_final, 3)
    assert told.value.reason.startswith(reason) and "\n" not in told.value.reason


def test_a_failure_travels_between_processes():
    failure = pickle.loads(pickle.dumps(WorkerCodeError("RuntimeError: x", 3, is_final=True, is_repeated=True)))
    assert (str(failure), failure.step, failure.is_final, failure.is_repeated) == ("RuntimeError: x", 3, True, True)


def failed(reason: str, step: int | None = 3, **kind: bool) -> WorkerCodeError:
    return WorkerCodeError(reason, step, **kind)


@pytest.mark.parametrize(
    ("attempts", "told"),
    [
        ([[failed("x")], [failed("x")]], "training failed twice at step 3: x"),
        ([[failed("x", None)], [failed("x", None)]], "training failed twice before its first step: x"),
        ([[failed("x", 0)], [failed("x", 0)]], "training failed twice at step 0: x"),
        ([[failed("x", 4)], [failed("x", 3)]], "training failed twice at step 3: x"),
        ([[failed("x", 3)], [failed("x", 4)]], None),
        ([[failed("x")], [failed("y")], [failed("x")]], None),
        ([[OSError(5, "Input/output error")]] * 3, None),
        ([[failed("x")], [OSError(5, "Input/output error")], [failed("x")]], None),
        ([[LOST_PEER, failed("x")], [failed("x"), LOST_PEER]], "training failed twice at step 3: x"),
        ([[DEATH, failed("x")], [DEATH, failed("x")]], None),
        ([[failed("x", is_final=True)]], "training failed at step 3: x"),
        ([[LOST_PEER, failed("x", None, is_final=True)]], "training failed before its first step: x"),
    ],
)
def test_what_would_fail_alike_is_not_tried_again(attempts, told):
    """`attempts`: the workers' failures in each. The last one's is told where there is to be no other."""
    policy = FailurePolicy(ray.train.FailureConfig(max_failures=5))
    errors = [ray.train.WorkerGroupError("", dict(enumerate(failures))) for failures in attempts]
    decisions = [policy.make_decision(error) for error in errors]
    assert decisions[:-1] == [FailureDecision.RETRY] * (len(attempts) - 1)
    assert decisions[-1] == (FailureDecision.RETRY if told is None else FailureDecision.RAISE)
    assert told is None or driver._told(errors[-1], 5) == told


def fail_thrice(config: dict[str, Any]) -> None:
    """The worker, whose step 3 is held up by its disk in the first attempt, and then by shapes that do not fit."""
    untouched, settings = TrainStep.train, config["settings"]

    def step(train_step: TrainStep, batch: Any) -> None:
        if train_step.state.step == 3:
            if _attempts(settings["storage"], settings["name"]) == 1:
                raise OSError(5, "Input/output error")
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        untouched(train_step, batch)

    TrainStep.train = step
    try:
        train_worker(config)
    finally:
        TrainStep.train = untouched


def _attempts(storage: str, name: str) -> int:
    events = RunFolder(f"{storage}/{name}").read_lines("events.jsonl")
    return sum(line["event"] in ("run_started", "restart") for line in events)


@pytest.mark.slow
def test_a_run_that_fails_alike_ends(digits, storage, trackers):
    """And not where its surroundings are to blame. MLflow hears that it failed."""
    run = settings(digits, storage, "fails", 1, **ONCE, monitor={"loggers": trackers})
    assert ends(run, attempts=3, loop=fail_thrice) == f"training failed twice at step 3: RuntimeError: {SHAPES}"
    assert [found.info.status for found in at_mlflow(run)] == ["FAILED" for _ in trackers]


@pytest.mark.slow
def test_a_run_that_cannot_start_ends_at_once(digits, storage, monkeypatch):
    monkeypatch.setattr(checks, "check_model", lambda settings: None)  # as where a worker's timm is another one
    run = settings(digits, storage, "fails-at-its-start", 1, model={"options": {"embed_dim": "wide"}}, **ONCE)
    assert ends(run, attempts=0).startswith("training failed before its first step: model.name = ")


def ends(run: Settings, attempts: int, **options: Any) -> str:
    """What is told of a run that fails in the last of so many attempts that got to their first step."""
    with pytest.raises(TrainError) as error:
        train(run, **options)
    told = str(error.value)
    assert told.startswith("training failed ") and "\n" not in told
    assert read_end(RunFolder.of(run)) == End("failed", message=told)
    assert _attempts(run.storage, run.name) == attempts
    return told


def test_damaged_data_ends_a_run_at_once_and_is_named(digits, storage, tmp_path):
    """Whichever of the workers comes upon it; and a word of its name that speaks of a lost peer changes nothing."""
    data = shutil.copytree(digits, tmp_path / "connection timed out")
    source = overwrite(data / "train-00000.parquet", 700)
    told = ends(settings(data, storage, "damaged", 2, **ONCE), attempts=1)
    assert f"{data}/train-00000.parquet, row 700 ({source}): the stored image cannot be decoded: " in told
