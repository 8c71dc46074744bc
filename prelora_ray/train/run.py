"""The driver: checks the settings, prepares the data, starts Ray, runs the workers, writes the result."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from prelora_ray.config import (
    Settings,
    WorkerSettings,
    acts,
    comparable,
    settled_alike,
    with_absolute_paths,
    without_effect,
)
from prelora_ray.data.manifest import Manifest, read_manifest
from prelora_ray.data.prepare import prepare
from prelora_ray.engine.check import check_model, drop_path_form
from prelora_ray.engine.model import check_length, create_model
from prelora_ray.engine.precision import check_precision
from prelora_ray.engine.pretrained import load_pretrained
from prelora_ray.engine.snapshot import checkpoint_name, epoch_of
from prelora_ray.errors import InterruptedRunError, UserError, WorkError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.fault_tolerance.end import FILE as END_FILE
from prelora_ray.fault_tolerance.end import End, read_end, remove_end, write_end
from prelora_ray.fault_tolerance.failure import failures_of, root_cause
from prelora_ray.fault_tolerance.lock import BEAT_SECONDS, DriverLock
from prelora_ray.fault_tolerance.notices import STOP_FILE
from prelora_ray.fault_tolerance.ray_private import (
    Guard,
    TorchConfig,
    TorchTrainer,
    release,
)
from prelora_ray.fault_tolerance.watchdog import OUTAGE_PATIENCE, PATIENCE
from prelora_ray.monitor import loggers
from prelora_ray.monitor.client import tell_end
from prelora_ray.monitor.exporter import start_exporter
from prelora_ray.monitor.telemetry import run_label
from prelora_ray.monitor.tracker import Outcome
from prelora_ray.nodes import check_seen_by_all_nodes
from prelora_ray.ray_session import ray_session
from prelora_ray.records import Starting
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage, check_out_folder, once_reachable
from prelora_ray.summaries import reservations
from prelora_ray.train.initial_weights import check_vocabulary, initial_weights
from prelora_ray.train.result import summarize
from prelora_ray.train.worker import train_worker
from prelora_ray.words import counted

logger = logging.getLogger(__name__)

_PREEMPTION_POLL_SECONDS = 0.25
"""Between looks for a notice of preemption, which has to reach the loop before its data dries up."""
_HEALTH_CHECK_SECONDS = 0.25
"""Between looks at the workers, at each of which Ray Train's controller takes up one report: an epoch may be short."""
_HEALTH_CHECKS = 256
"""Most workers that the controller looks at in a second; it has one core."""
_RESIZE_POLL_SECONDS = 5.0
"""Between polls whether there is room for more workers."""
_STOP_SECONDS = 0.5
"""Between tries to ask the workers to stop, where that fails."""
_TELL_SECONDS = 60.0
"""How long a service may take to hear of the end of a run whose workers are gone, a process's start included."""


class TrainError(WorkError):
    """The work failed; the message says where it stands."""


def check_settings(settings: Settings, folder: RunFolder) -> Settings | None:
    """All that can be checked before Ray starts. Returns the settings that the run was begun with, where it was.

    `settings`: with absolute paths. Raises UserError for settings that cannot work.
    """
    before = folder.read_settings() if folder.exists("config.yaml") else None
    if before is not None:
        _check_unchanged(before, settings, folder)
        Checkpoints(folder).check_schema()
        if folder.exists("data.json"):
            folder.read_classes()  # raises, where it is damaged, before Ray starts
    if folder.exists("result.json"):
        return before
    is_ready = Storage(settings.data.path).exists("manifest.json")
    for path in _written(settings, folder, is_ready=is_ready):
        check_out_folder(path)
    loggers.check_loggers(settings)
    check_model(settings)
    if (source := settings.model.init_from) is not None and before is None:
        tensors = initial_weights(source)  # raises early
        if not settings.model.takes_text:  # whose number of tokens comes with the data
            load_pretrained(create_model(settings.model, num_classes=1, seed=0), tensors, source)
    if not is_ready and settings.data.source is None:
        read_manifest(Storage(settings.data.path))  # raises, and says how to prepare it
    for sentence in without_effect(settings):
        logger.warning("%s", sentence)
    return before


def train(
    settings: Settings,
    *,
    debug: bool = False,
    callbacks: Sequence[ray.train.UserCallback] = (),
    loop: Callable[[dict[str, Any]], None] = train_worker,
) -> dict[str, Any]:
    """Trains a run to its end, from wherever it stands, and returns the contents of result.json.

    `callbacks` are Ray Train's, which hear of every report. `loop` is what each worker runs.

    Raises UserError for settings that cannot work, before Ray starts; TrainError where the work
    fails; InterruptedRunError on Ctrl-C; HeldRunError and LostRunError as DriverLock does.
    """
    settings = with_absolute_paths(settings)
    folder = RunFolder.of(settings)
    before = check_settings(settings, folder)
    if folder.exists("result.json"):
        result = folder.read_result()
        logger.info("run %s has finished already; give another --name for a new one", folder)
        return result
    settings = _settle_drop_path(settings, before)
    with DriverLock(folder) as lock, _starting(folder), ray_session(debug=debug) as is_embedded:
        settings = check_cluster(settings, folder, before, is_embedded=is_embedded)
        _prepare_once(settings, folder)
        manifest = check_data(settings, folder)
        if not folder.exists("data.json"):
            folder.write_json("data.json", _identity(manifest))
        folder.write_settings(settings)
        folder.remove_file(STOP_FILE)
        _start_exporter(settings)
        with stop_on_sigterm(folder):
            _fit(settings, folder, lock.check, callbacks, loop)
        tell_end(run_label(settings))
        _wait_for_storage(folder, settings.workers)
        check_finished(folder, settings.train.epochs)
        return write_result(folder)


def check_cluster(
    settings: Settings, folder: RunFolder, before: Settings | None, *, is_embedded: bool, writes: bool = True
) -> Settings:
    """Checks the Ray that runs: its room, and what its nodes see. Returns the settings with `workers.gpu` resolved.

    `before`: as `check_settings` returns it. Without `writes` no folder is made to see whether all nodes see it; the
    one that it would be made in is looked for. Raises UserError where the run cannot work there.
    """
    settings = _settle_gpu(settings, before, ray.cluster_resources().get("GPU", 0))
    _check_room(settings, is_embedded)
    _check_nodes_see(settings, folder, writes=writes)
    if not settings.workers.gpu:
        check_precision(settings.train.precision, torch.device("cpu"))
    return settings


def check_data(settings: Settings, folder: RunFolder) -> Manifest:
    """The manifest of the prepared data. Raises UserError where they are not whole, or not what the run began with."""
    manifest = read_manifest(Storage(settings.data.path))
    if manifest.task != settings.task:
        raise UserError(
            f"data.path = {settings.data.path!r} is not allowed with task = {settings.task!r}: it was prepared for "
            f"{manifest.task!r}"
        )
    check_num_classes(settings, len(manifest.classes))
    if manifest.text is not None:
        source = None if folder.exists("data.json") else settings.model.init_from
        with contextlib.nullcontext() if source else torch.device("meta"):
            model = create_model(settings.model, len(manifest.classes), seed=0)
        check_length(model, settings.data.path, manifest.text.sequence_length)
        if source is not None:
            tensors = initial_weights(source)  # raises where it is no run, export or file
            check_vocabulary(source, settings.data.path, manifest)
            load_pretrained(model, tensors, source)
    for split in manifest.splits:
        if not manifest.num_images(split):
            raise UserError(f"data.path = {settings.data.path!r} is not allowed: it has no {settings.sample}s in {split}")
    if folder.exists("data.json") and folder.read_json("data.json") != _identity(manifest):
        raise UserError(
            f"data.path = {settings.data.path!r} is not allowed: run {folder} was begun with other {settings.sample}s; "
            "resume it with those, or give another --name"
        )
    return manifest


def write_result(folder: RunFolder) -> dict[str, Any]:
    """Writes result.json and returns its contents. Raises TrainError where there is no room for it."""
    result = summarize(folder)
    try:
        folder.write_json("result.json", result)
    except OSError as error:
        raise TrainError(f"run {folder} is trained, but has no result yet ({error}); the same command writes it") from error
    return result


def check_finished(folder: RunFolder, epochs: int) -> None:
    """Raises InterruptedRunError where the run was stopped, and TrainError where it failed or is not whole."""
    end = read_end(folder)
    if end is not None and end.end == "failed":
        raise TrainError(end.message)
    names = Checkpoints(folder).names()
    begin = f"epoch {epoch_of(names[-1])} of {folder} (checkpoint {names[-1]})" if names else f"the start of {folder}"
    goes_on = f"the same command goes on from {begin}"
    if end is None:
        raise TrainError(f"training ended without {folder / END_FILE}, the record of how (is the disk full?); {goes_on}")
    if end.end == "stop":
        raise InterruptedRunError(f"stopped; {goes_on}")
    if checkpoint_name(epochs, 0) not in names:
        raise TrainError(f"training ended without a whole checkpoint of the last epoch; {goes_on}")


def _start_exporter(settings: Settings) -> None:
    """A run that cannot be watched runs all the same."""
    monitor = settings.monitor
    if not monitor.enabled:
        return
    try:
        address = start_exporter(monitor.host, monitor.port)
    except Exception as error:
        logger.warning("no metrics: the exporter did not start (%s)", root_cause(error))
        return
    taken = "" if address.endswith(f":{monitor.port}") else f" (not port {monitor.port})"
    logger.info("metrics at http://%s/metrics%s", address, taken)


@contextmanager
def stop_on_sigterm(folder: RunFolder) -> Iterator[None]:
    """On SIGTERM, asks the workers to save and to end, by an empty file: even most full disks have room for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asks: queue.SimpleQueue[bool] = queue.SimpleQueue()  # a signal may interrupt a `put` by another one

    def ask() -> None:
        is_asked = asks.get()
        while is_asked:
            try:
                return folder.write_bytes(STOP_FILE, b"")
            except OSError:
                with contextlib.suppress(queue.Empty):
                    is_asked = asks.get(timeout=_STOP_SECONDS)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    before = signal.signal(signal.SIGTERM, lambda *_: asks.put(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        asks.put(False)
        thread.join()
        with contextlib.suppress(OSError):  # the next start removes it too
            folder.remove_file(STOP_FILE)


def _settle_drop_path(settings: Settings, before: Settings | None) -> Settings:
    """The settings with `model.drop_path_form: auto` resolved: to what the run had, or at first by model and cell."""
    if before is not None:
        settings = settled_alike(settings, before)
    model = settings.model
    if model.drop_path_form != "auto" or model.drop_path == 0:
        return settings
    form = drop_path_form(model, settings.data.cell)
    logger.info("model.drop_path_form: auto is %s", form)
    return settings.model_copy(update={"model": model.model_copy(update={"drop_path_form": form})})


def _settle_gpu(settings: Settings, before: Settings | None, gpus: float) -> Settings:
    """The settings with `workers.gpu: auto` resolved: to what the run had, or at first whether Ray has enough GPUs."""
    workers = settings.workers
    if workers.gpu != "auto":
        return settings
    if before is not None and before.workers.gpu != "auto":
        gpu, why = before.workers.gpu, "as the run has had it so far"
    else:
        gpu = workers.take_gpus(gpus)
        why = f"as Ray has {counted(int(gpus), 'GPU')} and workers.min is {workers.min}"
        why += "" if gpu else "; for GPUs that come once they are asked for, set it to true"
    logger.info("workers.gpu: auto is %s, %s", str(gpu).lower(), why)
    return settings.model_copy(update={"workers": workers.model_copy(update={"gpu": gpu})})


def _check_room(settings: Settings, is_embedded: bool) -> None:
    """Ray Train waits for room silently: warns of that, and raises UserError where room can never come."""
    workers, has = settings.workers, ray.cluster_resources()
    for resource, each in (("CPU", workers.cpus), ("GPU", 1.0 if workers.gpu is True else 0.0)):
        needed, there = workers.min * each, has.get(resource, 0)
        if needed <= there:
            continue
        of_each = f"of {each:g} {resource}"
        told = (
            counted(workers.min, f"worker {of_each} needs", f"workers {of_each} need") + f" {needed:g}, and Ray has {there:g}"
        )
        if is_embedded:
            instead = "; workers.gpu: false trains on CPUs" if resource == "GPU" else ""
            raise UserError(f"workers.min = {workers.min} is not allowed on this machine: {told}{instead}")
        logger.warning("waiting for room: %s", told)


def _check_nodes_see(settings: Settings, folder: RunFolder, *, writes: bool) -> None:
    """Raises UserError, before anything is prepared or trained, where a node does not see a local path of the run."""
    data, is_ready = settings.data, Storage(settings.data.path).exists("manifest.json")
    images, written = data.path if is_ready else data.source, _written(settings, folder, is_ready=is_ready)
    reads = [path for path in (images, settings.model.init_from) if path is not None]
    check_seen_by_all_nodes(reads, written, touches=writes)


def _written(settings: Settings, folder: RunFolder, *, is_ready: bool) -> list[str]:
    """The folders that the run writes into: its own, and that of images where they are still to be prepared."""
    return [str(folder)] if is_ready else [settings.data.path, str(folder)]


def _fit(
    settings: Settings,
    folder: RunFolder,
    check_lock: Callable[[], None],
    callbacks: Sequence[ray.train.UserCallback],
    loop: Callable[[dict[str, Any]], None],
) -> None:
    workers = settings.workers
    is_elastic = workers.min < workers.max
    use_gpu = workers.gpu is True
    trainer = TorchTrainer(
        loop,
        train_loop_config={"settings": settings.model_dump(mode="json"), "reports_epochs": bool(callbacks)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min, workers.max) if is_elastic else workers.max,
            elastic_resize_monitor_interval_s=_RESIZE_POLL_SECONDS,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        torch_config=TorchConfig(timeout_s=int(workers.hang_seconds * PATIENCE)),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=folder.path if folder.is_local else str(folder),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=[*callbacks, Guard(check_lock, BEAT_SECONDS)],
        ),
    )
    try:
        with _ray_train_environment(workers):
            _fit_again_and_again(trainer, folder, check_lock, workers)
    except (SystemExit, KeyboardInterrupt):  # Ray Train's own handler of Ctrl-C ends its workers and exits
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # once more, where this takes too long
            _tell_services(settings, "stop")
        raise InterruptedRunError(f"interrupted; the same command goes on from the last checkpoint in {folder}") from None
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        check_lock()  # where it is lost, that is the reason, and the folder another driver's
        told = _told(error, workers.max_failures)
        with contextlib.suppress(OSError):
            write_end(folder, End("failed", message=told))
        _tell_services(settings, "failed")
        raise TrainError(told) from error


@contextmanager
def _ray_train_environment(workers: WorkerSettings) -> Iterator[None]:
    """Ray Train's own settings for the time of the block: `workers.hang_seconds`, others where the user gives none."""
    own = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": max(_HEALTH_CHECK_SECONDS, workers.max / _HEALTH_CHECKS),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": _PREEMPTION_POLL_SECONDS,
    }
    if workers.min < workers.max:  # a group that finds no room is to become smaller; one of fixed size can only wait
        own["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = 5
    set_here = {name: value for name, value in own.items() if name not in os.environ}
    set_here["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = workers.hang_seconds
    before = dict(os.environ)
    os.environ |= {name: f"{value:g}" for name, value in set_here.items()}
    try:
        yield
    finally:
        for name in set_here:
            os.environ.pop(name, None)
            os.environ |= {name: before[name]} if name in before else {}


def _tell_services(settings: Settings, outcome: Outcome) -> None:
    """Tells services how the run has ended, from a node, as nodes have their addresses and keys."""
    services = loggers.services_of(settings)
    if not services:
        return
    task = ray.remote(num_cpus=0)(loggers.tell_end)
    try:
        ray.get(task.remote(settings, outcome), timeout=_TELL_SECONDS * len(services))
    except ray.exceptions.RayError as error:
        logger.warning("%s may not know that the run has ended: %s", ", ".join(services), root_cause(error))


def _fit_again_and_again(
    trainer: TorchTrainer, folder: RunFolder, check_lock: Callable[[], None], workers: WorkerSettings
) -> None:
    """Fits, and starts again where Ray Train's controller dies or the workers leave nodes that are about to go."""
    lost = 0
    while True:
        _wait_for_storage(folder, workers)
        check_lock()  # before anything of another driver's is given back or removed
        if reserved := reservations(folder.events()):
            release(reserved[-1])
        remove_end(folder)
        folder.write_starting("place the workers")
        try:
            trainer.fit()
        except ray.exceptions.RayActorError:
            lost += 1
            if 0 <= workers.max_failures < lost:
                raise
            logger.warning("Ray Train's controller died; another one goes on")
            continue
        end = read_end(folder)
        if end is None or end.end != "preemption":
            return


def _wait_for_storage(folder: RunFolder, workers: WorkerSettings) -> None:
    """An outage of the storage is no reason to end."""
    once_reachable(lambda: folder.exists("config.yaml"), workers.hang_seconds * OUTAGE_PATIENCE)


def _told(error: Exception, max_failures: int) -> str:
    """Why a run ended, in one sentence."""
    for failure in failures_of(error):
        if failure.is_final or failure.is_repeated:
            where = "before its first step" if failure.step is None else f"at step {failure.step}"
            return f"training failed {'twice ' if failure.is_repeated else ''}{where}: {failure.reason}"
    if isinstance(error, ray.train.WorkerGroupError) and max_failures >= 0:
        return f"training failed after {counted(max_failures, 'restart')}: {root_cause(error)}"
    return f"training failed: {root_cause(error)}"


@contextmanager
def _starting(folder: RunFolder) -> Iterator[None]:
    """Has the run folder say what the run does before it trains; Ray's start comes first. For the time of a block."""
    folder.write_starting("start Ray")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.remove_file(Starting.FILE)


def _prepare_once(settings: Settings, folder: RunFolder) -> None:
    data = settings.data
    if data.source is not None and not Storage(data.path).exists("manifest.json"):
        folder.write_starting(f"prepare the {'text' if settings.model.takes_text else 'images'}")
        logger.info("preparing %s into %s", data.source, data.path)
        counts = prepare(data.source, data.path, data.prepare, task=settings.task).counts
        for note in counts.notes if counts else ():
            logger.info("%s", note)


def _check_unchanged(before: Settings, now: Settings, folder: RunFolder) -> None:
    """Raises UserError where a run is resumed with settings that would change its result."""
    old, new = comparable(before), comparable(settled_alike(now, before))
    for key in sorted(old | new):
        if old.get(key) == new.get(key) or acts(key) == "never":
            continue
        told = f"{key} = {new.get(key)!r} is not allowed: run {folder} was begun with {old.get(key)!r}"
        if key == "train.epochs" and now.train.epochs > before.train.epochs:
            raise UserError(
                f"{told}, over which its learning rate falls; more epochs are another run, which may begin with its weights: "
                f"prelora train RECIPE --name ANOTHER --set {key}={now.train.epochs} --set model.init_from={folder}"
            )
        raise UserError(f"{told}; resume it with that, or give another --name")


def check_num_classes(settings: Settings, classes: int) -> None:
    """Raises UserError where the data have another number of classes than the recipe says."""
    if settings.model.num_classes not in (None, classes):
        has = counted(classes, "token") if settings.model.takes_text else counted(classes, "class", "classes")
        raise UserError(
            f"model.num_classes = {settings.model.num_classes} is not allowed: {settings.data.path!r} has {has}; leave it out "
            "to take theirs"
        )


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What a run is trained on, as data.json holds it."""
    return {"classes": list(manifest.classes), "fingerprint": manifest.fingerprint}
