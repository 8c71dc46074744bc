"""cluster.yaml is what Ray's launcher takes, jobs/rayjob.yaml the same for Kubernetes; neither is open to the world."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    """The RayJob's cluster."""
    return yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]


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
    for node in cluster["available_node_types"].values():  # else Ray makes a group that lets anybody in by SSH
        assert node["node_config"]["SecurityGroupIds"]
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token") for command in starts)
    assert "0.0.0.0" not in " ".join(commands)


def test_a_jobs_python_is_the_one_that_has_the_projects_packages(cluster):
    """A job's command finds `python` on the PATH of the `ray start` on its node."""
    (install,) = [command for command in cluster["setup_commands"] if "pip install" in command]
    (environment,) = set(re.findall(r"(\S+)/bin/pip install .* '\.\[.*\]'$", install))
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    for command in (command for command in commands if " ray start" in command):
        assert f"PATH={environment}/bin:$PATH ray start" in command


def test_the_token_is_its_owners_alone(cluster):
    """Ray writes it for all to read, and so would it be on every node."""
    (token,) = [place for place in cluster["file_mounts"] if place.endswith("auth_token")]
    assert token == "/home/ubuntu/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"][0]
    for page in ("cluster.yaml", "docs/operations.md", "README.md"):
        lines = [line for line in (ROOT / page).read_text().splitlines() if "get-auth-token --generate" in line]
        assert all("umask 077; ray get-auth-token" in line for line in lines)


def test_what_is_not_copied_to_the_nodes_lies_at_the_top(cluster):
    """rsync leaves out what a pattern without a slash in front names at any depth: of `data` prelora_ray/data too."""
    assert [pattern for pattern in cluster["rsync_exclude"] if not pattern.startswith("/")] == []


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync on this machine (Debian: apt install rsync)")
def test_the_whole_package_is_copied_to_the_nodes(cluster, tmp_path):
    for name in ("prelora_ray/data/order.py", "prelora_ray/cli.py", "data/train-00000.parquet", "runs/a/end.json"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).touch()
    excluded = [f"--exclude={pattern}" for pattern in cluster["rsync_exclude"]]
    subprocess.run(["rsync", "-a", *excluded, f"{tmp_path}/from/", f"{tmp_path}/to/"], check=True)
    copied = [str(path.relative_to(tmp_path / "to")) for path in (tmp_path / "to").rglob("*") if path.is_file()]
    assert sorted(copied) == ["prelora_ray/cli.py", "prelora_ray/data/order.py"]


def test_prometheus_watches_from_the_head(cluster):
    (start,) = [command for command in cluster["head_start_ray_commands"] if "prometheus" in command]
    assert "--web.listen-address=127.0.0.1:9090" in start
    assert (ROOT / "dashboards" / "prometheus" / "prometheus.yml").exists()


def test_kubernetes_gets_the_same_nodes(cluster, rayjob):
    groups = {group["groupName"]: group for group in rayjob["workerGroupSpecs"]}
    types = {name: node for name, node in cluster["available_node_types"].items() if name != "head"}
    assert groups.keys() == types.keys()
    for name, node in types.items():
        assert (groups[name]["minReplicas"], groups[name]["maxReplicas"]) == (node["min_workers"], node["max_workers"])
        pod = groups[name]["template"]
        assert pod["metadata"]["labels"] == node["labels"]
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) == node["resources"]["CPU"]
        assert limits.get("nvidia.com/gpu", 0) == node["resources"].get("GPU", 0)
    head = rayjob["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == str(cluster["available_node_types"]["head"]["resources"]["CPU"])


def test_kubernetes_opens_nothing_to_the_world(rayjob):
    assert rayjob["authOptions"]["mode"] == "token"
    head = rayjob["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert "--web.listen-address=127.0.0.1:9090" in head["template"]["spec"]["containers"][1]["args"]


def test_every_mount_of_kubernetes_has_its_volume(rayjob):
    for group in (rayjob["headGroupSpec"], *rayjob["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_recipes_and_pages_speak_of_the_share_that_every_node_mounts(cluster, rayjob):
    (mounted,) = re.findall(r"sudo mount \S+ \S+ \S+ (\S+)\)", " ".join(cluster["setup_commands"]))
    for group in (rayjob["headGroupSpec"], *rayjob["workerGroupSpecs"]):
        ray = group["template"]["spec"]["containers"][0]
        assert [mount["mountPath"] for mount in ray["volumeMounts"] if mount["name"] == "shared"] == [mounted]
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("jobs/**/*.yaml")]
    named = {(page.name, path) for page in pages for path in re.findall(r"/mnt/\w+", page.read_text())}
    assert {path for _, path in named} == {mounted}
    recipes = {"imagenet_vit_small.yaml", "imagenet_vit_large.yaml"}
    assert recipes | {"rayjob.yaml", "README.md", "operations.md"} <= {name for name, _ in named}


@pytest.mark.parametrize("recipe", ["imagenet_vit_small", "imagenet_vit_large"])
def test_a_recipes_command_is_that_of_the_page(recipe):
    head, _ = (ROOT / "jobs" / "configs" / f"{recipe}.yaml").read_text().split("# Data:")
    command = re.search(r"(RAY_AUTH_MODE=token )?ray job submit .*", unbroken(head))
    assert command is not None
    page = unbroken((ROOT / "docs" / "operations.md").read_text())
    assert command.group() in page.replace("--submission-id first ", "")


def unbroken(text: str) -> str:
    """The text in one line, without a comment's marks and a command's line breaks."""
    return " ".join(re.sub(r"(?m)^#|\\$", "", text).split())


def test_versions_are_the_installed_ones(rayjob):
    import ray

    assert rayjob["rayVersion"] == ray.__version__
    assert f"ray:{ray.__version__}-py311-gpu" in (ROOT / "jobs" / "Dockerfile").read_text()
