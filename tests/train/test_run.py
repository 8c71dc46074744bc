"""Whole runs on Ray: killed in every phase and resumed they end with the bits of an undisturbed one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import ray
import torch

from prelora_ray.config import Settings, WorkerSettings
from prelora_ray.data.manifest import read_manifest, write_manifest
from prelora_ray.data.prepare import prepare
from prelora_ray.engine.state import TrainState
from prelora_ray.errors import InterruptedRunError, UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.lock import LostRunError, claims, holder
from prelora_ray.fault_tolerance.notices import STOP_FILE
from prelora_ray.method.adapters import merged_state_dict
from prelora_ray.method.phases import Phase
from prelora_ray.recorded.replay import read_record, replay
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.train import run as run_module
from prelora_ray.train.checks import check_data, identity
from prelora_ray.train.run import TrainError, train
from prelora_ray.train.worker import train_worker
from tests.chaos.faults import give_notice
from tests.chaos.site import wait_for
from tests.conftest import samples
from tests.disturbed import KILLED_IN_EACH_PHASE, Disturbed, train_disturbed
from tests.monitor.test_tensorboard import read
from tests.runs import EPOCHS, FREEZE, SWITCH, assert_same_bits, at_mlflow, children, final, settings, wait_inside

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_killed_in_every_phase_it_ends_with_the_same_bits(disturbed, undisturbed):
    """A worker; Ray Train's controller, whose room nobody else may take; all workers, the newest checkpoint damaged."""
    ends_as_undisturbed(disturbed, undisturbed(2))
    folder = RunFolder.of(disturbed.run)
    assert [line["event"] for line in folder.read_lines("events.jsonl")].count("checkpoint_damaged") == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killed_on_any_number_of_workers_it_ends_with_the_same_bits(digits, storage, undisturbed, workers):
    run = settings(digits, storage, f"killed-{workers}", workers, checkpoint={"every_steps": 4})
    ends_as_undisturbed(train_disturbed(run, KILLED_IN_EACH_PHASE), undisturbed(workers))


def ends_as_undisturbed(disturbed: Disturbed, plain: Settings, phases: Sequence[str] = tuple(Phase)) -> None:
    """`phases`: those in which something happened to it, each time once."""
    assert disturbed.phases == list(phases)
    result = disturbed.result
    assert result["restarts"] == len(phases)
    assert (result["switch_epoch"], result["freeze_epoch"], result["epochs"]) == (SWITCH, FREEZE, EPOCHS)
    assert_same_bits(final(disturbed.run), final(plain))
    assert samples(RunFolder.of(disturbed.run)) == samples(RunFolder.of(plain))


@pytest.mark.slow
def test_stopped_by_sigterm_it_goes_on_where_it_stood(digits, storage, bucket, undisturbed, trackers):
    """Meanwhile another driver of the run is refused. Its data are in a bucket, those of the other run on a disk. To
    MLflow both halves are one run, of rank 0 alone."""
    data = f"{bucket}/digits"
    prepare("digits", data)
    assert read_manifest(Storage(data)).splits == read_manifest(Storage(digits)).splits
    ways = {"checkpoint": {"every_steps": 4}, "monitor": {"loggers": ["tensorboard", *trackers]}}
    run = settings(digits, storage, "stopped", 2, data={"path": data}, **ways)
    refusals: list[str] = []

    def disturb() -> None:
        while holder(RunFolder.of(run)) is None:
            time.sleep(0.01)
        try:
            train(run)
        except ValueError as error:
            refusals.append(str(error))
        wait_inside(RunFolder.of(run), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=disturb, daemon=True).start()
    with pytest.raises(InterruptedRunError, match="the same command goes on from epoch"):
        train(run)
    assert f"is being trained by process {os.getpid()} on {socket.gethostname()}" in refusals[0]
    assert not RunFolder.of(run).exists(STOP_FILE)
    train(run)
    assert_same_bits(final(run), final(undisturbed(2)))
    (restart,) = (line for line in RunFolder.of(run).read_lines("events.jsonl") if line["event"] == "restart")
    assert (restart["cause"], restart["steps_again"]) == ("stop", 0)
    losses = [(line.epoch + 1, line.loss) for line in RunFolder.of(run).epochs()]
    if trackers:
        assert losses_at_mlflow(run) == losses
    sheets = {(image.width, image.height) for image in read(RunFolder.of(run)).Images("samples")}
    assert sheets == {(6 * (size + 2), 6 * (size + 2)) for size in (4, 6, 8)}  # 36 images of each size, and borders


def losses_at_mlflow(run: Settings) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    (found,) = at_mlflow(run)
    assert found.info.status == "FINISHED"
    history = MlflowClient().get_metric_history(found.info.run_id, "loss/train")
    return sorted((entry.step, entry.value) for entry in history)


@pytest.mark.slow
def test_taken_over_it_ends_and_leaves_the_folder_to_the_other_driver(digits, storage, monkeypatch):
    monkeypatch.setattr(run_module, "BEAT_SECONDS", 0.1)
    run = settings(digits, storage, "taken-over", 1, checkpoint={"every_steps": 4})
    folder = RunFolder.of(run)

    def take_over() -> None:
        wait_inside(folder, 0)
        (name,) = claims(folder)
        folder.write_json("driver-other.json", {"host": "elsewhere", "pid": 7, "holds": True})
        folder.remove_file(name)

    threading.Thread(target=take_over, daemon=True).start()
    with pytest.raises(LostRunError, match="another driver, process 7 on elsewhere, has taken over run"):
        train(run)
    assert children(os.getpid(), "RayTrainWorker") == []
    assert list(claims(folder)) == ["driver-other.json"]
    assert not folder.exists("stop.json") and not folder.exists("result.json")
    assert [line["event"] for line in folder.read_lines("events.jsonl")][-1] not in ("run_failed", "stop")


@pytest.fixture
def node(ray_cluster) -> Iterator[str]:
    """Id of a second node of this process's Ray, for the time of a test."""
    others = {one["NodeID"] for one in ray.nodes()}
    start = ["-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=4"]
    address = f"--address={ray.get_runtime_context().gcs_address}"
    process = subprocess.Popen([sys.executable, *start, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ids() -> set[str]:
        return {one["NodeID"] for one in ray.nodes() if one["Alive"]} - others

    yield wait_for(ids, 60, "the node's start").pop()
    process.terminate()
    process.wait()
    wait_for(lambda: not ids(), 60, "the node's end")


@pytest.mark.slow
def test_a_run_leaves_a_node_that_is_to_go_and_equals_one_on_one_worker(digits, storage, undisturbed, node):
    """Its weights too, to 1e-5 in float64: on two workers sums are taken in another order."""
    workers = {"min": 1, "max": 2, "cpus": 4.0}  # there is room for one on each node
    run = settings(digits, storage, "left", 1, workers=workers, train={"precision": "fp64"}, checkpoint={"every_steps": 4})
    folder = RunFolder.of(run)

    def disturb() -> None:
        wait_inside(folder, 1)
        give_notice(ray.get_runtime_context().gcs_address, node, 120)

    threading.Thread(target=disturb, daemon=True).start()
    assert train(run)["restarts"] == 1
    assert {line.world_size for line in folder.epochs()} == {1, 2}
    (restart,) = (line for line in folder.read_lines("events.jsonl") if line["event"] == "restart")
    assert (restart["cause"], restart["world_size"], restart["steps_again"]) == ("preemption", 1, 0)
    assert_close(run, undisturbed(1, "fp64"))


def test_one_run_through_all_phases(undisturbed):
    run = undisturbed(2)
    folder = RunFolder.of(run)
    epochs = folder.epochs()
    assert [line.phase for line in epochs] == ["full"] * 3 + ["warmup"] * 2 + ["lora"] * 2
    assert [line.image_size for line in epochs] == [4] + [6] * 5 + [8]
    assert all(line.world_size == 2 and line.images == 1438 for line in epochs)
    tensors = list(TrainState(run, 10, 1, torch.device("cpu"), 1).model.parameters())
    assert epochs[0].gradient_bytes == sum(tensor.numel() * 4 for tensor in tensors)
    assert epochs[-1].gradient_bytes == 4 * epochs[-1].trainable_parameters < epochs[0].gradient_bytes
    ranks = folder.read_json("ranks.json")
    assert len(ranks) == 18
    assert len(set(ranks.values())) > 1
    events = [line["event"] for line in folder.read_lines("events.jsonl")]
    assert [event for event in events if event not in ("window", "checkpoint")] == ["run_started", "switch", "freeze"]
    seen = samples(RunFolder.of(run))
    for epoch in range(EPOCHS):
        ids = [i for (e, _), part in seen.items() if e == epoch for i in part]
        assert sorted(ids) == list(range(1438))


def test_rank_0_alone_reports_to_ray_what_grows_with_the_workers(undisturbed):
    path = Path(RunFolder.of(undisturbed(2)).path).with_suffix(".reports")
    reports = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(report["epoch"], len(report["worker_seconds"]["data"]), *others) for report, *others in reports] == [
        (epoch, 2, {}) for epoch in range(EPOCHS)
    ]


def tell_reports(config: dict[str, Any]) -> None:
    """The loop of a run, which also writes down what it reports to Ray Train."""
    report, told = ray.train.report, Path(config["settings"]["storage"], "reports")

    def tell(metrics: dict[str, Any], *checkpoint: Any) -> None:
        with told.open("a") as file:
            print(json.dumps([metrics["epoch"], metrics["next_phase"], metrics["switch_epoch"]]), file=file)
        report(metrics, *checkpoint)

    ray.train.report = tell
    train_worker(config)


@pytest.mark.slow
def test_a_run_of_which_nobody_hears_reports_the_ends_of_its_phases(digits, tmp_path):
    train(settings(digits, tmp_path, "alone", 1), loop=tell_reports)
    reports = [json.loads(line) for line in (tmp_path / "reports").read_text().splitlines()]
    assert reports == [[SWITCH - 1, "warmup", SWITCH], [FREEZE - 1, "lora", SWITCH], [EPOCHS - 1, "lora", SWITCH]]


def test_replaying_the_record_gives_the_runs_own_switch_and_ranks(undisturbed):
    folder = RunFolder.of(undisturbed(2))
    record = read_record(str(folder))
    result = replay(record, record.method, record.ramp_epochs)
    assert result.switch_epoch == folder.read_json("result.json")["switch_epoch"] == SWITCH
    assert result.ranks == folder.read_json("ranks.json")
    windows = folder.read_lines("windows.jsonl")
    assert [verdict.family_change for verdict in result.verdicts] == [line["change"] for line in windows[:SWITCH]]


def test_lora_checkpoint_is_what_it_says(undisturbed):
    """Frozen weights are those of the freeze; the checkpoint's parts make up the model that the run ended with."""
    run = undisturbed(2)
    checkpoints = Checkpoints(RunFolder.of(run))
    end, freeze = final(run), checkpoints.load(f"{FREEZE:05d}-000000")
    folder = Path(checkpoints.folder.path)
    written = [(folder / name).stat().st_mtime_ns for name in ("base.safetensors", f"{FREEZE:05d}-000000/manifest.json")]
    assert written == sorted(written)  # with the first checkpoint that refers to it, and not again
    assert end.state["phases"]["phase"] == Phase.LORA
    assert {name.split(".", 2)[2] for name in end.base} == {
        f"{layer}.{part}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for part in ("weight", "bias")
    }
    assert all(torch.equal(tensor, freeze.base[name]) for name, tensor in end.base.items())
    assert not torch.equal(end.model["head.weight"], freeze.model["head.weight"])
    assert not any(name in end.optimizer for name in end.base)
    state = TrainState(run, 10, 15, torch.device("cpu"), 1, end)
    merged = merged_state_dict(state.model)
    assert set(merged) == set(end.base) | set(end.model)
    assert not torch.equal(merged["blocks.0.attn.qkv.weight"], end.base["blocks.0.attn.qkv.weight"])


@pytest.mark.slow
def test_one_worker_equals_three_in_float64(undisturbed):
    assert_close(undisturbed(1, "fp64"), undisturbed(3, "fp64"))


@pytest.mark.slow
def test_compiled_blocks_with_merged_adapters_train_alike_and_survive_a_kill(digits, storage, undisturbed):
    """As on GPUs; each phase and each start compiles for some ten seconds."""
    way = {"precision": "fp64", "compile": True, "adapters": "merged"}
    run = settings(digits, storage, "compiled", 2, train=way, checkpoint={"every_steps": 4})
    disturbed = train_disturbed(run, {FREEZE: "worker killed"})
    assert disturbed.result["restarts"] == 1
    assert disturbed.phases == ["lora"]
    assert_close(run, undisturbed(1, "fp64"))


def assert_close(one: Settings, other: Settings) -> None:
    """The same samples, switch and ranks, and weights that agree in float64."""
    assert samples(RunFolder.of(one)) == samples(RunFolder.of(other))
    assert RunFolder.of(one).read_json("ranks.json") == RunFolder.of(other).read_json("ranks.json")
    a, b = final(one), final(other)
    assert a.state["phases"]["switch_epoch"] == b.state["phases"]["switch_epoch"] == SWITCH
    for part in ("model", "base", "adapter"):
        ours, theirs = getattr(a, part), getattr(b, part)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == torch.float64
            assert (tensor - theirs[name]).norm() <= 1e-5 * tensor.norm(), name


def test_a_finished_run_is_not_run_again(undisturbed):
    run = undisturbed(2)
    before = Path(RunFolder.of(run).path, "epochs.jsonl").read_bytes()
    assert train(run)["switch_epoch"] == SWITCH
    assert Path(RunFolder.of(run).path, "epochs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_whose_result_found_no_room_is_finished_by_the_same_command(undisturbed, storage):
    """It trains nothing again, as the last checkpoint is there."""
    run = undisturbed(2)
    again = run.model_copy(update={"name": "without-a-result"})
    shutil.copytree(RunFolder.of(run).path, RunFolder.of(again).path)
    folder = RunFolder.of(again)
    for name in ("config.yaml", "result.json", "end.json", "ranks.json"):
        folder.remove_file(name)
    expected = RunFolder.of(run).read_json("result.json")
    assert train(again) == expected | {"restarts": 1, "seconds": ANY}
    assert folder.read_json("end.json") == {"end": "finished", "epoch": EPOCHS, "step": 15 * EPOCHS, "message": None}


@pytest.mark.parametrize("inside", ["storage", "data"])
def test_what_would_end_with_its_job_is_refused_before_it_is_made(tmp_path, inside):
    """A folder in what Ray has uploaded, which it removes as the job ends, with the run's lock."""
    package = tmp_path / "_ray_pkg_0a1b"
    places = {"storage": tmp_path / "runs", "data": tmp_path / "data", inside: package / inside}
    run = settings(places["data"], places["storage"], "in-a-job", 1, data={"source": "digits"})
    with pytest.raises(UserError, match=rf"^'{package}/{inside}.*' is not allowed in a job: "):
        train(run)
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_other_settings_is_refused(undisturbed, digits, storage):
    run = undisturbed(2)
    other = settings(digits, storage, run.name, 2, train={"learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"train\.learning_rate = 0\.5 is not allowed: run .* was begun with 0\.001"):
        train(other)


def test_more_epochs_are_refused_with_the_way_to_train_on(undisturbed, digits, storage):
    run = undisturbed(2)
    longer = settings(digits, storage, run.name, 2, train={"epochs": EPOCHS + 5})
    with pytest.raises(ValueError, match=r"train\.epochs = 12 is not allowed: .* with 7, .*--set model\.init_from="):
        train(longer)
    shorter = settings(digits, storage, run.name, 2, train={"epochs": EPOCHS - 1})
    with pytest.raises(ValueError, match=r"train\.epochs = 6 is not allowed: .* with 7; resume it with that, or give"):
        train(shorter)


def test_resuming_with_other_images_is_refused(digits, storage, tmp_path):
    """The same ones elsewhere are not other images."""
    run = settings(digits, storage, "other-images", 1)
    copy = shutil.copytree(digits, tmp_path / "digits")
    elsewhere = run.model_copy(update={"data": run.data.model_copy(update={"path": str(copy)})})
    folder, manifest = RunFolder.of(run), read_manifest(Storage(digits))
    folder.write_settings(run)
    folder.write_json("data.json", identity(check_data(run, folder)))
    assert check_data(elsewhere, folder).splits == manifest.splits
    (shard, *others) = manifest.splits["train"]
    shards = (dataclasses.replace(shard, sha256="0" * 64), *others)
    write_manifest(Storage(copy), dataclasses.replace(manifest, splits={**manifest.splits, "train": shards}))
    with pytest.raises(ValueError, match=r"data\.path = .* is not allowed: run .* was begun with other images"):
        train(elsewhere)


def test_a_damaged_manifest_is_told_and_its_images_are_not_prepared_over(digits, storage, tmp_path):
    copy = shutil.copytree(digits, tmp_path / "digits")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        train(settings(digits, storage, "torn", 1, data={"path": str(copy), "source": "digits"}))
    assert (copy / "manifest.json").read_text() == "{"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_checkpoint(digits, storage):
    run = settings(digits, storage, "diverged", 2, train={"learning_rate": 1e30, "clip_norm": None})
    with pytest.raises(TrainError, match=r"not finite at step \d+ .*phase full; .*checkpoint"):
        train(run)
    events = RunFolder.of(run).read_lines("events.jsonl")
    assert events[-1]["event"] == "run_failed"
    assert [line["event"] for line in events].count("restart") == 0


def test_config_holds_every_key_and_reads_back(undisturbed):
    """`workers.gpu` is there as what `auto` came to, without which a resume might come to something else."""
    run = undisturbed(2)
    read = RunFolder.of(run).read_settings()
    assert run.workers.gpu == "auto" and read.workers.gpu is False
    assert read == run.model_copy(update={"workers": run.workers.model_copy(update={"gpu": False})})
    assert json.loads(read.model_dump_json())["method"]["scaling"] == 2.0


def test_a_controller_looks_at_so_many_workers_a_second_at_most(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "9")
    monkeypatch.delenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", raising=False)
    before = dict(os.environ)
    seconds = {}
    for workers in (1, 64, 128, 512):
        with run_module._ray_train_environment(WorkerSettings(min=workers, max=workers)):
            seconds[workers] = float(os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"])
            assert os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] == "9", "the user's"
        assert dict(os.environ) == before
    assert seconds == {1: 0.25, 64: 0.25, 128: 0.5, 512: 2.0}
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "8")
    with run_module._ray_train_environment(WorkerSettings(max=512, hang_seconds=30)):
        assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
        assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "30", "workers.hang_seconds"
    assert os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] == "8"
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
