"""A real Prometheus with this project's configuration."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import yaml

CONFIG = Path(__file__).parent.parent / "dashboards" / "prometheus"
PROGRAM = shutil.which("prometheus")
SCRAPE = {"prelora": "200ms", "ray": "1s"}
"""A phase may last half a second."""


class Prometheus:
    """One that watches an exporter and this process's Ray, until it is closed."""

    def __init__(self, folder: Path, exporter: str) -> None:
        assert PROGRAM
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(CONFIG / "alerts.yml")]
        (node,) = (node for node in ray.nodes() if node["Alive"])
        targets = {"prelora": exporter, "ray": f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"}
        config["scrape_configs"] = [
            {"job_name": job, "scrape_interval": SCRAPE[job], "static_configs": [{"targets": [target]}]}
            for job, target in targets.items()
        ]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._closing = contextlib.ExitStack()
        self.query = self._closing.enter_context(serving(PROGRAM, folder / "prometheus.yml", folder / "data"))

    def close(self) -> None:
        self._closing.close()


@contextlib.contextmanager
def serving(program: str, config: Path, data: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """A Prometheus for the time of the block; yields what answers a query."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    files = [f"--config.file={config}", f"--storage.tsdb.path={data}", f"--web.listen-address={address}"]
    server = subprocess.Popen([program, *files], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def query(expression: str) -> list[dict[str, Any]]:
        path = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(path, timeout=10) as answer:
            return list(json.loads(answer.read())["data"]["result"])
        assert server.poll() is None, "Prometheus has ended"
        return []  # it has not begun to listen

    try:
        yield query
    finally:
        server.terminate()
        server.wait()
