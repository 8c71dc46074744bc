"""Serves the metrics of all runs of a cluster at one address: a detached actor on the head that nobody waits for.

Several clusters of one machine, such as two embedded ones, have an exporter each, at a port of its own. Each says in a
file beside Ray's own where it listens, which Prometheus follows (`file_sd_configs`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import ray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from prelora_ray.monitor.metrics import merged

NAME, NAMESPACE = "prelora-exporter", "prelora"
SILENT_SECONDS = 60.0
"""A worker that sends nothing for so long has left."""
KEEP_SECONDS = 300.0
"""How long a finished run's last values stay, and those of one that fell silent."""
REQUEST_SECONDS = 5.0
"""How long a client may take to send its request, and to take the answer."""
PORTS = 50
"""Ports that are tried, from the requested one on."""
DISCOVERY = "prelora-exporter-{port}.json"
"""Name of the file, in Ray's folder for temporary files, that tells Prometheus of an exporter."""
_KNOCK_SECONDS = 1.0


class Board(Collector):
    """The latest values of every source of every run."""

    def __init__(self, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, dict[str, tuple[float, list[Metric]]]] = {}
        self._world_sizes: dict[str, int] = {}
        self._finished: dict[str, float] = {}

    def update(self, run: str, source: str, metrics: list[Metric], world_size: int) -> None:
        """Takes a source's values, and drops workers that have left the group. A source is a rank, or `run`."""
        with self._lock:
            self._finished.pop(run, None)
            said = self._said.setdefault(run, {})
            said[source] = self._clock(), metrics
            if self._world_sizes.get(run) != world_size:  # no message is to cost more for having more workers
                self._world_sizes[run] = world_size
                for rank in [other for other in said if other.isdigit() and int(other) >= world_size]:
                    del said[rank]

    def finish(self, run: str) -> None:
        with self._lock:
            self._finished[run] = self._clock()

    def collect(self) -> list[Metric]:
        now = self._clock()
        with self._lock:
            for run, said in list(self._said.items()):
                last = max((at for at, _ in said.values()), default=float("-inf"))
                if now - self._finished.get(run, last) > KEEP_SECONDS:
                    del self._said[run]
                    del self._world_sizes[run]
                    self._finished.pop(run, None)
                elif run not in self._finished and now - last <= SILENT_SECONDS:
                    for source in [source for source, (at, _) in said.items() if now - at > SILENT_SECONDS]:
                        del said[source]
            sources = [metrics for said in self._said.values() for _, metrics in said.values()]
        return merged(sources)


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics and /healthz, and nothing else."""

    registry: CollectorRegistry
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        if self.path.split("?")[0] == "/metrics":
            self._answer(200, generate_latest(self.registry), CONTENT_TYPE_LATEST)
        elif self.path == "/healthz":
            self._answer(200, b"ok\n", "text/plain")
        else:
            self._answer(404, b"only /metrics and /healthz are here\n", "text/plain")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def serve(board: Board, host: str, port: int) -> ThreadingHTTPServer:
    """Serves a board from a thread, at the first free port from `port` on. Raises OSError where none is free."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(board)
    handler = type("Handler", (_Handler,), {"registry": registry})
    make_server = _IPv6Server if ":" in host else ThreadingHTTPServer
    for candidate in range(port, port + PORTS):
        try:
            server = make_server((host, candidate), handler)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or candidate == port + PORTS - 1:
                raise
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def announce(address: str, folder: Path) -> None:
    """Writes the file that tells Prometheus of an exporter, and removes those of exporters that are gone.

    `address`: as `Exporter.address` has it. An exporter that listens on every network is asked on loopback.
    """
    host, _, port = address.rpartition(":")
    own = folder / DISCOVERY.format(port=port)
    for other in folder.glob(DISCOVERY.format(port="*")):
        if other != own and not _listens(other):
            other.unlink(missing_ok=True)
    target = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    unfinished = own.with_suffix(".tmp")
    unfinished.write_text(json.dumps([{"targets": [f"{target}:{port}"]}]) + "\n")
    os.replace(unfinished, own)  # Prometheus reads it as soon as it is there


def _listens(file: Path) -> bool:
    """Whether something listens where a file says that an exporter does."""
    try:
        (target,) = json.loads(file.read_text())[0]["targets"]
        host, _, port = target.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return True


class Exporter:
    """The actor. When it dies it loses all values, and receives them again within a second of its restart."""

    def __init__(self, host: str, port: int, discovery: str | None = None) -> None:
        """`discovery`: folder for the file that tells Prometheus where it listens; by default Ray's temporary one."""
        self._board = Board()
        self._server = serve(self._board, host, port)
        with contextlib.suppress(OSError):  # a full disk, or another user's folder: the run says where it listens
            announce(self.address(), Path(discovery or ray.get_runtime_context().get_temp_dir()))

    def address(self) -> str:
        """Host and port as in a URL: an IPv6 address is in brackets."""
        host, port = str(self._server.server_address[0]), self._server.server_address[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def update(self, run: str, source: str, metrics: list[Metric], world_size: int) -> None:
        self._board.update(run, source, metrics, world_size)

    def finish(self, run: str) -> None:
        self._board.finish(run)


def start_exporter(host: str, port: int) -> str:
    """Starts the cluster's exporter where there is none; returns where it listens."""
    actor = (
        ray.remote(Exporter)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_pending_calls=1000,
            scheduling_strategy="DEFAULT",  # outside the placement group of a Tune trial, which ends with the trial
            resources={"node:__internal_head__": 0.001},
        )
        .remote(host, port)
    )
    address: str = ray.get(actor.address.remote(), timeout=30)
    return address
