"""How many workers Ray may start while a node is about to go, and what is left of dead controllers."""

from __future__ import annotations

import site
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
from ray.data._internal.stats import STATS_ACTOR_NAME, STATS_ACTOR_NAMESPACE
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

from prelora_ray.fault_tolerance import ray_private
from prelora_ray.fault_tolerance.ray_private import (
    _DATA_ACTORS,
    FailurePolicy,
    JobConfig,
    ScalingPolicy,
    TorchTrainer,
    release_groups_of_dead_actors,
    remove_unborn_actors,
)
from tests.chaos.site import wait_for


def test_workers_import_from_where_the_driver_does(monkeypatch, tmp_path):
    """Ray adds the script's folder and the current one; a folder is handed on where the driver imports from it too."""
    package = str(Path(ray_private.__file__).parents[2])

    def handed_on(path: list[str], *added: str, **runtime_env: str) -> list[str]:
        monkeypatch.setattr(sys, "path", [*path, *site.getsitepackages()])
        config = JobConfig(runtime_env=runtime_env)
        config._py_driver_sys_path.extend(added)
        return list(config._get_proto_job_config().py_driver_sys_path)

    assert handed_on([], str(tmp_path)) == []
    assert handed_on([package], str(tmp_path)) == [package]
    assert handed_on([package, "/jobs"], "/jobs", package) == ["/jobs", package]
    assert handed_on([package], working_dir="gcs://package.zip") == []  # which holds the package


def living_nodes() -> list[dict[str, Any]]:
    """Without those that other tests have added to the cluster and taken away."""
    return [node for node in ray.nodes() if node["Alive"]]


@ray.remote(num_cpus=0)
class Controller:
    """Acts as Ray Train's controller: asks the policy for sizes, with all of the cluster reserved for its run."""

    def __init__(self) -> None:
        config = ray.train.ScalingConfig(
            num_workers=(1, 6), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0
        )
        self.policy = ScalingPolicy(config)
        self.policy._maybe_send_resource_request = lambda: None
        self.policy._get_reserved_resources = lambda: {node["NodeID"]: node["Resources"] for node in living_nodes()}

    def give_notice(self) -> None:
        """As if the cluster's only node were about to go."""
        (node,) = living_nodes()
        ray._private.state.state.get_draining_nodes = lambda: {node["NodeID"]: 0}

    def asked_of_the_autoscaler(self) -> int:
        return self.policy._get_num_workers_for_resource_request()

    def new_group(self) -> int:
        return self.policy.make_decision_for_non_running_worker_group().num_workers

    def running_group(self, num_workers: int) -> int:
        """The size that a group of so many is to have."""
        state = SimpleNamespace(num_workers=num_workers, start_time=0.0)
        decision = self.policy.make_decision_for_running_worker_group(state, None)
        return num_workers if isinstance(decision, NoopDecision) else decision.num_workers


def test_a_new_group_has_room_for_each_worker_and_a_notice_shrinks_no_running_one(ray_cluster):
    controller = Controller.remote()
    assert ray.get(controller.new_group.remote()) == 4  # the cluster's CPUs
    assert ray.get(controller.running_group.remote(2)) == 4
    ray.get(controller.give_notice.remote())
    assert [ray.get(controller.running_group.remote(size)) for size in (1, 2, 3)] == [1, 2, 3]
    assert ray.get(controller.new_group.remote()) == 1
    assert ray.get(controller.asked_of_the_autoscaler.remote()) == 6
    ray.kill(controller)


@ray.remote(num_cpus=0)
class Reserver:
    """Reserves a CPU, as a controller does for its workers."""

    def __init__(self) -> None:
        self.group = ray.util.placement_group([{"CPU": 1}])
        ray.get(self.group.ready())

    def name(self) -> str:
        return self.group.id.hex()


def test_groups_of_dead_actors_are_given_back_and_no_others(ray_cluster):
    ours = ray.util.placement_group([{"CPU": 1}])
    living, dying = Reserver.remote(), Reserver.remote()
    left = ray.get([living.name.remote(), dying.name.remote()])
    assert release_groups_of_dead_actors().isdisjoint(left)
    ray.kill(dying)
    released: set[str] = set()

    def is_released() -> bool:
        released.update(release_groups_of_dead_actors())
        return left[1] in released

    wait_for(is_released, 20, "the dead actor's group is given back")
    assert left[0] not in released
    assert group_state(left[0]) == "CREATED"
    wait_for(lambda: group_state(left[1]) == "REMOVED", 20, "the group is gone")
    ray.kill(living)
    wait_for(lambda: left[0] in release_groups_of_dead_actors(), 20, "the other one is given back too")
    assert group_state(ours.id.hex()) == "CREATED"
    ray.util.remove_placement_group(ours)


def group_state(name: str) -> str:
    return ray.util.placement_group_table()[name]["state"]


@ray.remote(num_cpus=0)
def never() -> None:
    time.sleep(3600)


@ray.remote(num_cpus=0)
class Unborn:
    """Takes a name and waits for what never comes."""

    def __init__(self, _: None) -> None:
        pass


def test_an_actor_of_ray_data_that_died_unborn_is_replaced(ray_cluster):
    name = {"name": "ActorLocationTracker", "namespace": "ActorLocationTracker"}
    ray.kill(get_or_create_actor_location_tracker())
    wait_for(lambda: not exists(**name), 20, "the name is free")
    waited_for = never.remote()
    unborn = Unborn.options(lifetime="detached", **name).remote(waited_for)
    assert ray.get_actor(**name) == unborn
    remove_unborn_actors()
    wait_for(lambda: not exists(**name), 20, "the name is free")
    assert ray.get(get_or_create_actor_location_tracker().get_actor_locations.remote(["a"]), timeout=30) == {"a": None}
    ray.cancel(waited_for, force=True)


def test_living_actors_of_ray_data_are_left_alone(ray_cluster):
    tracker = get_or_create_actor_location_tracker()
    ray.get(tracker.update_actor_location.remote("a", "here"))
    remove_unborn_actors()
    assert ray.get(tracker.get_actor_locations.remote(["a"])) == {"a": "here"}


def exists(name: str, namespace: str) -> bool:
    return {"name": name, "namespace": namespace} in ray.util.list_named_actors(all_namespaces=True)


def test_ray_names_its_actors_as_we_do():
    assert _DATA_ACTORS[STATS_ACTOR_NAME] == STATS_ACTOR_NAMESPACE
    for create in (get_or_create_actor_location_tracker, get_or_create_autoscaling_coordinator):
        assert set(_DATA_ACTORS) & set(create.__code__.co_consts)


def test_the_coordinator_counts_nodes_before_it_is_asked_what_is_reserved(monkeypatch):
    asked = []
    policy = ScalingPolicy(ray.train.ScalingConfig(num_workers=(1, 2)))
    monkeypatch.setattr(policy, "_count_nodes", lambda: asked.append("count"))
    monkeypatch.setattr(ElasticScalingPolicy, "_get_reserved_resources", lambda _: asked.append("ask"))
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    policy.make_decision_for_non_running_worker_group()
    assert asked == ["count", "ask"]


def test_a_trainer_has_our_policies(monkeypatch):
    """They go in where Ray Train makes its own."""
    given = {}
    monkeypatch.setattr(
        ray.train.torch.TorchTrainer, "_initialize_and_run_controller", lambda _, **arguments: given.update(arguments)
    )
    elastic = ray.train.ScalingConfig(num_workers=(1, 2))
    TorchTrainer(print, scaling_config=elastic)._initialize_and_run_controller(scaling_policy=None, failure_policy=None)
    assert (type(given["scaling_policy"]), type(given["failure_policy"])) == (ScalingPolicy, FailurePolicy)
    TorchTrainer(print)._initialize_and_run_controller(scaling_policy="fixed", failure_policy=None)
    assert given["scaling_policy"] == "fixed"


def test_ray_train_counts_in_the_function_that_we_override():
    for decide in ("make_decision_for_running_worker_group", "make_decision_for_non_running_worker_group"):
        assert "_count_possible_workers" in getattr(ElasticScalingPolicy, decide).__code__.co_names
