"""cluster.yaml is what Ray's launcher takes, and opens nothing to the world."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())


def test_rays_own_schema_takes_it(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    cluster["available_node_types"]["a100"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(copy.deepcopy(cluster)))
    del cluster["available_node_types"]["a100"]["min_worker"]


def test_gpus_are_spot_a100s_and_the_head_does_no_work(cluster):
    types = cluster["available_node_types"]
    assert types["a100"]["resources"]["GPU"] == 8
    assert types["a100"]["max_workers"] == 8
    assert types["a100"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["head"]["resources"]["CPU"] == 0


def test_nothing_is_open_to_the_world(cluster):
    assert cluster["provider"]["use_internal_ips"] is True
    for node in cluster["available_node_types"].values():  # without a group of yours Ray makes one that lets anybody in by SSH
        assert node["node_config"]["SecurityGroupIds"]
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token") for command in starts)
    assert "0.0.0.0" not in " ".join(commands)
