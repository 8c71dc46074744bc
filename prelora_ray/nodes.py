"""Whether the nodes of a cluster see the paths that the driver sees."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prelora_ray.errors import UserError

_PATIENCE_SECONDS = 5.0
"""A file share may show a new file a little later elsewhere."""
_ANSWER_SECONDS = 60.0


def check_seen_by_all_nodes(reads: Iterable[str] = (), writes: Iterable[str] = (), *, touches: bool = True) -> None:
    """Has every node that may get work look for absolute local paths: those that are there, and folders to write into.

    A folder to write into is made, and holds a hidden file during the check; without `touches` the nearest folder above
    it that is there is looked for instead. What is no absolute path, such as an address in a bucket, is not checked,
    and neither are nodes that join later.

    Raises UserError, with the path and the node, where a node does not see one.
    """
    folders = [path for path in writes if os.path.isabs(path)]
    nodes = _other_nodes()
    if not nodes:
        return
    if not touches:
        reads, folders = [*reads, *(_nearest(path) for path in folders)], []
    looked_for = {_something_of(path): path for path in reads if os.path.isabs(path) and os.path.exists(path)}
    tokens = []
    try:
        for path in folders:
            os.makedirs(path, exist_ok=True)
            tokens.append(Path(path, f".seen-{uuid.uuid4().hex}"))
            tokens[-1].touch()
            looked_for[str(tokens[-1])] = path
        _look(nodes, looked_for)
    finally:
        for token in tokens:
            token.unlink(missing_ok=True)


def _other_nodes() -> dict[str, str]:
    """Names by id of the nodes other than the driver's that have CPUs: a head without any gets no work."""
    own = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerHostname"] + f" ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and node["Resources"].get("CPU")
    }


def _nearest(path: str) -> str:
    """The path itself, or the nearest folder above it that is there."""
    return path if os.path.exists(path) else _nearest(os.path.dirname(path))


def _something_of(path: str) -> str:
    """The path itself, or a file in it where it is a folder: a mount point may be there without its share."""
    if not os.path.isdir(path):
        return path
    with os.scandir(path) as entries:
        return next((entry.path for entry in entries if not entry.name.startswith(".")), path)


def _look(nodes: dict[str, str], looked_for: dict[str, str]) -> None:
    """`looked_for`: file to look for -> path to name in the error. Ignores nodes that do not answer: they may go."""
    task = ray.remote(num_cpus=0, max_retries=0)(_missing)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(list(looked_for)): name
        for node, name in nodes.items()
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    for answer in answered:
        try:
            missing = ray.get(answer)
        except ray.exceptions.RayError:
            continue
        if missing:
            raise UserError(
                f"{looked_for[missing[0]]!r} is not there on node {asked[answer]}: mount it at the same place on every node, "
                "or give a folder or bucket that all nodes see"
            )


def _missing(paths: list[str]) -> list[str]:
    """Those that this node does not see."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while (missing := [path for path in paths if not os.path.exists(path)]) and time.monotonic() < end:
        time.sleep(0.2)
    return missing
