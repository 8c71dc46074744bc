"""How many workers Ray may start while a node is about to go, and what is left of dead controllers."""

from __future__ import annotations

import site
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
from ray.data._internal.stats import STATS_ACTOR_NAME, STATS_ACTOR_NAMESPACE
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from prelora_ray.fault_tolerance.ray_private import (
    _DATA_ACTORS,
    JobConfig,
    ScalingConfig,
    release_groups_of_dead_actors,
    remove_unborn_actors,
)
from prelora_ray.train import ray_private
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


@ray.remote(num_cpus=0)
class Controller:
    """Stands where Ray Train's controller does: in an actor, and asks for sizes from functions of the same names."""

    def __init__(self) -> None:
        ray_private._count_nodes = lambda: None
        self.config = ScalingConfig(num_workers=(1, 6), resources_per_worker={"CPU": 1})

    def give_notice(self) -> None:
        """As if the cluster's only node were about to go."""
        (node,) = ray.nodes()
        ray._private.state.state.get_draining_nodes = lambda: {node["NodeID"]: 0}

    def asked_of_the_autoscaler(self) -> int:
        return self.config.max_workers

    def new_group(self) -> int:
        return self._count_possible_workers()

    def running_group(self, num_workers: int) -> int:
        return self.make_decision_for_running_worker_group(SimpleNamespace(num_workers=num_workers))

    def make_decision_for_running_worker_group(self, worker_group_state: SimpleNamespace) -> int:
        return self._count_possible_workers()

    def _count_possible_workers(self) -> int:
        return self.config.max_workers


def test_a_new_group_has_room_for_each_worker_and_a_notice_shrinks_no_running_one(ray_cluster):
    controller = Controller.remote()
    assert ray.get(controller.new_group.remote()) == 4  # the cluster's CPUs
    ray.get(controller.give_notice.remote())
    assert ray.get(controller.new_group.remote()) == 1
    assert [ray.get(controller.running_group.remote(size)) for size in (1, 2, 3)] == [1, 2, 3]
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


def test_ray_decides_on_sizes_where_we_look():
    decide = ElasticScalingPolicy.make_decision_for_running_worker_group.__code__
    assert "worker_group_state" in decide.co_varnames
    assert "_count_possible_workers" in decide.co_names
    assert "max_workers" in ElasticScalingPolicy._count_possible_workers.__code__.co_names
    assert "max_workers" in ElasticScalingPolicy._get_num_workers_for_resource_request.__code__.co_names
