"""Looks at the nodes of a cluster for what slows or ends a run: versions, clocks, memory, limits, a shared folder."""

from __future__ import annotations

import contextlib
import os
import resource
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prelora_ray.errors import UserError, one_line
from prelora_ray.storage import Storage
from prelora_ray.words import counted

_ANSWER_SECONDS = 60.0
_CLOCK_SECONDS = 1.0
"""By which clocks may differ."""
_OPEN_FILES = 4096
"""That a process needs: Ray has a connection to every worker, and a run a file for every shard."""
_FREE_STORE = 0.25
"""Share of a node's object store that must be free before a run begins."""
_SHARE_SECONDS = 5.0
"""A file share may show a new file a little later elsewhere."""
_SHM = "/dev/shm"


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node says of itself."""

    name: str
    torch: str
    nccl: str | None
    """Version of the one that torch brings; None without CUDA."""
    driver: str | None
    """Version of NVIDIA's; None without one."""
    clock: float
    """Seconds by which its clock is ahead of the driver's, at least: what the way there takes is not counted."""
    open_files: int
    """Limit of a process."""
    shm_bytes: int
    shm_free_bytes: int
    """Of /dev/shm, where its object store should lie."""
    store_bytes: int
    """That its object store may take."""
    unseen: str | None
    """Why it does not read what was written into the shared folder; None where it does, or none was given."""


def examine_cluster(share: str | None = None) -> tuple[list[Node], list[str]]:
    """All nodes of the Ray that runs, and what is wrong with them, a sentence each; none where all is well.

    `share`: folder or bucket that all nodes must see. A hidden file is written into it, and removed. Raises UserError
    where it cannot be written.
    """
    with _written(share) as token:
        nodes, findings = _asked(share, token)
    return nodes, findings + findings_of(nodes)


def findings_of(nodes: list[Node]) -> list[str]:
    """What is wrong with nodes, by themselves or beside the others."""
    findings = []
    for what, versions in (
        ("torch", {node.name: node.torch for node in nodes}),
        ("NCCL", {node.name: node.nccl for node in nodes}),
        ("NVIDIA driver", {node.name: node.driver for node in nodes}),
    ):
        findings += _unlike(what, {name: version for name, version in versions.items() if version is not None})
    for node in nodes:
        shm, free, store = (f"{n / 2**30:.1f} GiB" for n in (node.shm_bytes, node.shm_free_bytes, node.store_bytes))
        if abs(node.clock) > _CLOCK_SECONDS:
            ahead = "ahead of" if node.clock > 0 else "behind"
            findings.append(f"{node.name}: its clock is {abs(node.clock):.1f} s {ahead} this one; have all follow one (chrony)")
        if node.open_files < _OPEN_FILES:
            findings.append(f"{node.name}: a process may open {node.open_files} files; allow {_OPEN_FILES} (ulimit -n)")
        if node.shm_bytes < node.store_bytes:
            findings.append(
                f"{node.name}: {_SHM} has {shm}, less than its object store of {store}, which "
                "then lies on a disk; make it larger (--shm-size of a container, emptyDir of a pod)"
            )
        elif node.shm_free_bytes < _FREE_STORE * node.store_bytes:
            findings.append(
                f"{node.name}: {_SHM} has {free} free for an object store of {store}; "
                "remove what an ended Ray or other programs have left there"
            )
        if node.unseen is not None:
            findings.append(f"{node.name}: {node.unseen}")
    return findings


def _unlike(what: str, versions: Mapping[str, str]) -> list[str]:
    """A sentence for each node whose version is not what most have."""
    if not versions:
        return []
    usual, number = Counter(versions.values()).most_common(1)[0]
    others = counted(number, "node has", "nodes have")
    return [
        f"{name}: {what} {version}, and {others} {usual}; install the same everywhere"
        for name, version in versions.items()
        if version != usual
    ]


@contextlib.contextmanager
def _written(share: str | None) -> Iterator[str]:
    """Name of a file that is in the folder for the time of the block, if one is given."""
    token = f".seen-{uuid.uuid4().hex}"
    if share is None:
        yield token
        return
    folder = Storage(share)
    try:
        folder.write_bytes(token, token.encode())
    except OSError as error:
        raise UserError(f"{share!r} is not allowed: it cannot be written from here ({one_line(error)})") from None
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            folder.remove_file(token)


def _asked(share: str | None, token: str) -> tuple[list[Node], list[str]]:
    """What all nodes say, and a sentence for each that says nothing."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    uri = None if share is None else Storage(share).uri
    actor = ray.remote(num_cpus=0, max_restarts=0)(_Witness)
    witnesses = {
        node["NodeID"]: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
    }
    answers = {node: witness.look.remote(uri, token) for node, witness in witnesses.items()}
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_SECONDS)
    nodes, findings = [], []
    for node in alive:
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})"
        try:
            told = ray.get(answers[node["NodeID"]], timeout=0)
            begin = time.time()
            theirs, end = ray.get(witnesses[node["NodeID"]].now.remote(), timeout=_ANSWER_SECONDS), time.time()
        except ray.exceptions.RayError as error:
            findings.append(f"{name}: it does not answer ({type(error).__name__})")
            continue
        clock = theirs - min(max(theirs, begin), end)
        nodes.append(Node(name=name, clock=clock, store_bytes=int(node["Resources"].get("object_store_memory", 0)), **told))
    return nodes, findings


class _Witness:
    """On one node."""

    def look(self, uri: str | None, token: str) -> dict[str, str | int | None]:
        shm = os.statvfs(_SHM)
        driver = Path("/sys/module/nvidia/version")
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
        return {
            "torch": torch.__version__,
            "nccl": None if nccl is None else ".".join(map(str, nccl)),
            "driver": driver.read_text().strip() if driver.exists() else None,
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "shm_bytes": shm.f_blocks * shm.f_frsize,
            "shm_free_bytes": shm.f_bavail * shm.f_frsize,
            "unseen": None if uri is None else _unseen(uri, token),
        }

    def now(self) -> float:
        return time.time()


def _unseen(uri: str, token: str) -> str | None:
    """Why this node does not read the file; None where it does."""
    end = time.monotonic() + _SHARE_SECONDS
    while True:
        try:
            if Storage(uri).read_bytes(token) == token.encode():
                return None
            reason = "another content"
        except OSError as error:
            reason = type(error).__name__ if isinstance(error, FileNotFoundError) else one_line(error)
        if time.monotonic() > end:
            return f"it does not read what was written into {uri!r} ({reason}); mount it at the same place on every node"
        time.sleep(0.2)
