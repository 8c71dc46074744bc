"""`prelora doctor --cluster`: what is said of nodes. tests/test_elsewhere.py has a node that is wrong."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from typing import Any

import pytest
import torch

from prelora_ray.cluster_doctor import Node, examine_cluster, findings_of
from prelora_ray.errors import UserError

WELL = Node(
    name="a",
    torch="2.9.0",
    nccl="2.27.5",
    driver="550.2",
    clock=0.4,
    open_files=65536,
    shm_bytes=2**34,
    shm_free_bytes=2**33,
    store_bytes=2**33,
    unseen=None,
)


def of_three(**content: Any) -> list[str]:
    """What is found where the last of three nodes differs."""
    nodes = [WELL, dataclasses.replace(WELL, name="b"), dataclasses.replace(WELL, name="c", **content)]
    return findings_of(nodes)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"torch": "2.8.0"}, "c: torch 2.8.0, and 2 nodes have 2.9.0; install the same everywhere"),
        ({"nccl": "2.20.5"}, "c: NCCL 2.20.5, and 2 nodes have 2.27.5; install the same everywhere"),
        ({"driver": "535.1"}, "c: NVIDIA driver 535.1, and 2 nodes have 550.2; install the same everywhere"),
        ({"clock": -2.5}, "c: its clock is 2.5 s behind this one; have all follow one (chrony)"),
        ({"clock": 1.5}, "c: its clock is 1.5 s ahead of this one; have all follow one (chrony)"),
        ({"open_files": 1024}, "c: a process may open 1024 files; allow 4096 (ulimit -n)"),
        (
            {"shm_bytes": 2**26},
            "c: /dev/shm has 0.1 GiB, less than its object store of 8.0 GiB, which then lies on a disk; make it larger "
            "(--shm-size of a container, emptyDir of a pod)",
        ),
        (
            {"shm_free_bytes": 2**30},
            "c: /dev/shm has 1.0 GiB free for an object store of 8.0 GiB; remove what an ended Ray or other programs have "
            "left there",
        ),
        ({"unseen": "it does not read"}, "c: it does not read"),
        ({"driver": None, "nccl": None}, None),
    ],
)
def test_a_node_that_is_wrong_is_named_in_a_sentence(content: dict[str, Any], told: str | None) -> None:
    assert of_three(**content) == ([] if told is None else [told])


def test_this_machine_says_what_it_is(ray_cluster: None, tmp_path: Any) -> None:
    (node,), findings = examine_cluster(str(tmp_path))
    assert (node.torch, node.open_files) == (torch.__version__, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    assert node.shm_bytes == shutil.disk_usage("/dev/shm").total
    assert node.unseen is None and node.store_bytes > 0
    assert not [finding for finding in findings if "clock" in finding or "read" in finding]
    assert not list(tmp_path.iterdir()), "the file that was looked for is gone"


def test_a_folder_that_cannot_be_written_is_told(ray_cluster: None, tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file' is not allowed: it cannot be written from here"):
        examine_cluster(str(tmp_path / "file"))
