"""The driver: has the settings checked, prepares the data, starts Ray, runs the workers, writes the result."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch

from prelora_ray.config import (
    Settings,
    WorkerSettings,
    with_absolute_paths,
)
from prelora_ray.data.prepare import prepare
from prelora_ray.engine.snapshot import checkpoint_name, epoch_of
from prelora_ray.environment import environment
from prelora_ray.errors import InterruptedRunError, WorkError
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
from prelora_ray.ray_session import ray_session
from prelora_ray.records import Starting
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage, once_reachable
from prelora_ray.summaries import reservations
from prelora_ray.train.checks import check_cluster, check_data, check_settings, identity, settle
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
    with DriverLock(folder) as lock, _starting(folder), ray_session(debug=debug) as is_embedded:
        settings = settle(settings, before, ray.cluster_resources().get("GPU", 0))
        check_cluster(settings, folder, is_embedded=is_embedded)
        _prepare_once(settings, folder)
        manifest = check_data(settings, folder)
        if not folder.exists("data.json"):
            folder.write_json("data.json", identity(manifest))
        folder.write_settings(settings)
        folder.remove_file(STOP_FILE)
        _start_exporter(settings)
        with stop_on_sigterm(folder):
            _fit(settings, folder, lock.check, callbacks, loop)
        tell_end(run_label(settings))
        _wait_for_storage(folder, settings.workers)
        check_finished(folder, settings.train.epochs)
        return write_result(folder)


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


def _ray_train_environment(workers: WorkerSettings) -> AbstractContextManager[None]:
    """Ray Train's own settings for the time of a block: `workers.hang_seconds`, others where the user gives none."""
    own = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": max(_HEALTH_CHECK_SECONDS, workers.max / _HEALTH_CHECKS),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": _PREEMPTION_POLL_SECONDS,
    }
    if workers.min < workers.max:  # a group that finds no room is to become smaller; one of fixed size can only wait
        own["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = 5
    wanted = {name: f"{value:g}" for name, value in own.items() if name not in os.environ}
    return environment(wanted | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{workers.hang_seconds:g}"})


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
