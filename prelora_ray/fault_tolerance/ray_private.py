"""The parts of Ray 2.60's private API that an elastic run needs, in one place.

A run reserves room: an elastic one with Ray's autoscaling coordinator, every one by a placement group. Where its
controller or driver dies, the first reservation stays for 180 s, and the second until Ray's dashboard, which an
embedded Ray does not have, reports the controller dead. The same run, started again, would wait for what it has itself
reserved. Nor does Ray remove an actor that was registered by a process that died before it was created ("unborn").
"""

from __future__ import annotations

import contextlib
import functools
import os
import site
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.job_config
import ray.train.torch
from ray._private import services
from ray._private.utils import detect_fate_sharing_support
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.util.placement_group import PlacementGroup

from prelora_ray.fault_tolerance.background import Background
from prelora_ray.fault_tolerance.failure import WorkerCodeError, failures_of

_SHUTDOWN_SECONDS = 2
_COUNT_SECONDS = 2.0
_UNBORN_SECONDS = 1.0
"""How long a registered actor may wait to be created: a living process does that within milliseconds."""
_DATA_ACTORS = {
    "ActorLocationTracker": "ActorLocationTracker",
    "AutoscalingCoordinator": "AutoscalingCoordinator",
    "datasets_stats_actor": "_dataset_stats_actor",
}
"""Names of Ray Data's shared actors, with their namespaces."""


class JobConfig(ray.job_config.JobConfig):
    """Ray's, whose workers import from where the driver does.

    Ray's own has them look first in the folder of the driver's script and in the one that the driver was started in,
    which may hold a module with the name of a library; and it does not pass on where the driver found this package.
    """

    _py_driver_sys_path: list[str]

    def _get_proto_job_config(self) -> Any:
        own = {os.path.abspath(place) for place in sys.path}
        package = str(Path(__file__).parents[2])
        installed = package in {*site.getsitepackages(), site.getusersitepackages()}
        places = [place for place in self._py_driver_sys_path if place in own]
        if package in own and not installed and not self._runtime_env_has_working_dir():
            places.append(package)
        self._py_driver_sys_path = list(dict.fromkeys(places))
        return super()._get_proto_job_config()


@contextlib.contextmanager
def in_process_groups_of_their_own() -> Iterator[None]:
    """What Ray starts on this machine in the block is not of the driver's process group.

    A signal to that group, as `timeout`, a terminal or a process manager sends it, is for the driver, which saves and
    then ends Ray. Where the driver dies, the kernel ends Ray's processes; where it cannot, they stay in the group.
    """
    if not detect_fate_sharing_support():
        yield
        return
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


class TorchTrainer(ray.train.torch.TorchTrainer):
    """Ray Train's, which does not retry what would fail alike, and does not count on nodes that are about to go.

    It starts no actor that shares out datasets: every worker streams its own part, so a start takes less time.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        own: dict[str, Any] = {"failure_policy": FailurePolicy(self.run_config.failure_config)}
        if self.scaling_config.elasticity_enabled:
            own["scaling_policy"] = ScalingPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**{**arguments, **own})


class FailurePolicy(DefaultFailurePolicy):
    """Ray Train's, which ends a run whose worker fails for good, or as in the previous attempt and no step further."""

    def __init__(self, failure_config: ray.train.FailureConfig) -> None:
        super().__init__(failure_config)
        self._before: list[WorkerCodeError] = []

    def make_decision(self, training_failed_error: ray.train.TrainingFailedError) -> FailureDecision:
        decision = super().make_decision(training_failed_error)
        failures = failures_of(training_failed_error)
        for failure in failures:
            failure.is_repeated = any(failure.repeats(earlier) for earlier in self._before)
        self._before = failures
        is_hopeless = any(failure.is_final or failure.is_repeated for failure in failures)
        return FailureDecision.RAISE if is_hopeless else decision


class TorchConfig(ray.train.torch.TorchConfig):
    """Ray Train's, whose controller waits 2 s, not 30, for a worker that hangs to leave its process group.

    Ray reads this limit from the environment of the controller, which does not get the driver's.
    """

    @property
    def backend_cls(self) -> Any:
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", str(_SHUTDOWN_SECONDS))
        return super().backend_cls


class Guard(ControllerCallback, WorkerGroupCallback):
    """A callback of Ray Train that ends a fit, workers and all and without another try, once `check` raises.

    Its controller calls `check` every few seconds, and before it starts workers: also where the driver is suspended.
    While workers train, `check` runs in a thread: it may wait for storage, but the workers wait for the controller.
    """

    def __init__(self, check: Callable[[], None], seconds: float) -> None:
        self._check = check
        self._seconds = seconds
        self._time = float("-inf")
        self._polling = Background()
        self._raised: Exception | None = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if self._raised is not None:
            raise self._raised
        if time.monotonic() - self._time >= self._seconds and not self._polling.is_busy:
            self._time = time.monotonic()
            self._polling.begin(self._poll)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        self._check()

    def _poll(self) -> None:
        try:
            self._check()
        except Exception as error:
            self._raised = error


class ScalingPolicy(ElasticScalingPolicy):
    """Ray Train's, with no more workers in a new group than have room on the nodes that are to stay.

    Ray counts a node that is about to go as room until it is gone, though it starts nothing on it. And it counts nodes
    every 20 s, and meanwhile waits for those that are gone. What it asks of an autoscaler is unchanged.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._running = 0
        """Size of the group that runs."""
        self._counted = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._running = 0
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._running = worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _get_reserved_resources(self) -> Any:
        self._count_nodes()  # the coordinator answers in the order in which it is asked
        return super()._get_reserved_resources()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """What is reserved has room for, less what stands on nodes that leave, and no less than the group that runs.

        A notice must not make Ray shrink a running group: the group commits a checkpoint and leaves by itself.
        """
        config = self.scaling_config
        leaving = ray._private.state.state.get_draining_nodes()
        needed = {name: amount for name, amount in config._resources_per_worker_not_none.items() if amount}
        staying = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
        room = sum(min(int(node.get(name, 0) // amount) for name, amount in needed.items()) for node in staying)
        possible: int = super()._count_possible_workers(reserved_resources)
        return min(possible, max(config.min_workers, room, self._running))

    def _count_nodes(self) -> None:
        """Has Ray's autoscaling coordinator look at the cluster now, without waiting for it."""
        if time.monotonic() - self._counted > _COUNT_SECONDS:
            self._counted = time.monotonic()
            get_or_create_autoscaling_coordinator().get_reserved_resources.remote("none", recompute=True)


def let_trials_be_stopped() -> None:
    """Has Ray Train find its cluster where Tune stops a trial, also where a file on the machine names another cluster.

    The actor that gives back a stopped trial's room looks for its cluster without an address; where that
    fails, it does so silently, and the room is lost to all later trials.
    """
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def keep_token_private() -> None:
    """Makes Ray's token, a password to all that it runs, readable to its owner alone: Ray lets every user read it.

    Makes its folder too, so that the token is private from its first moment on.
    """
    folder = Path.home() / ".ray"
    with contextlib.suppress(OSError):  # no home folder, or somebody else's
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "auth_token").chmod(0o600)


def preemption() -> Any:
    """Ray's PreemptionInfo, as far as this worker has received it; None while no node of the group is about to go.

    `ray.train.get_preemption_info` tells the same, but waits for every worker to call it.
    """
    return get_train_context().preemption_context.preemption_info


def reservation() -> dict[str, str]:
    """What the controller of this Train worker has reserved: names that `release` takes."""
    group = ray.util.get_current_placement_group()
    return {
        "requester": f"train-{get_train_context().train_run_context.run_id}",
        "placement_group": group.id.hex() if group else "",
    }


def release(names: dict[str, str]) -> None:
    """Gives back what a dead controller has reserved; nothing happens where it is gone already."""
    with contextlib.suppress(Exception):  # what is not given back here ends by itself, later
        ray.get(get_or_create_autoscaling_coordinator().cancel_request.remote(requester_id=names["requester"]), timeout=10)
        if names["placement_group"]:
            _remove_placement_group(names["placement_group"])


def release_groups_of_dead_actors() -> set[str]:
    """Gives back the placement groups of this job whose actor is dead, and returns their names.

    Ray keeps them to the end of the job. A stopped trial's controller that lives a little longer than its workers may
    have reserved one that is in no record.
    """
    table = [
        PlacementGroupTableData.FromString(entry)
        for entry in ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    ]
    job = ray.get_runtime_context().get_job_id()
    dead = {
        group.placement_group_id.hex()
        for group in table
        if group.creator_actor_dead
        and group.creator_actor_id != ActorID.nil().binary()  # the driver's own, whose creator counts as a dead actor
        and not group.is_detached
        and group.creator_job_id.hex() == job
        and group.state != PlacementGroupTableData.REMOVED
    }
    for name in dead:
        _remove_placement_group(name)
    return dead


def remove_unborn_actors() -> None:
    """Removes those of Ray Data's shared actors that were registered by a process that died before it had them created.

    A worker that is killed just after the node of such an actor went may leave one: every stream
    then finds it by its name, and waits for it forever.
    """
    unborn = _registered_only()
    if unborn:
        time.sleep(_UNBORN_SECONDS)
    for name, _ in unborn & _registered_only():
        with contextlib.suppress(ValueError):  # it is gone
            ray.kill(ray.get_actor(name, _DATA_ACTORS[name]))


def _registered_only() -> set[tuple[str, str]]:
    """Names and ids."""
    actors = ray._private.state.actors(actor_state_name="DEPENDENCIES_UNREADY")
    return {(actor["Name"], actor_id) for actor_id, actor in actors.items() if actor["Name"] in _DATA_ACTORS}


def _remove_placement_group(name: str) -> None:
    ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
