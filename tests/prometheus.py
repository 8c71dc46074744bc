"""A real Prometheus with this project's configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import ray
import yaml

CONFIG = Path(__file__).parent.parent / "dashboards" / "prometheus"
PROGRAM = shutil.which("prometheus")
PORT = 19090
SCRAPE = {"prelora": "200ms", "ray": "1s"}
"""A phase may last half a second."""


class Prometheus:
    """One that watches an exporter and this process's Ray, until it is closed."""

    def __init__(self, folder: Path, exporter: str) -> None:
        assert PROGRAM
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(CONFIG / "alerts.yml")]
        (node,) = ray.nodes()
        targets = {"prelora": exporter, "ray": f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"}
        config["scrape_configs"] = [
            {"job_name": job, "scrape_interval": SCRAPE[job], "static_configs": [{"targets": [target]}]}
            for job, target in targets.items()
        ]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self._server = subprocess.Popen(
            [PROGRAM, *files, f"--web.listen-address=127.0.0.1:{PORT}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def query(self, expression: str) -> list[dict[str, Any]]:
        address = f"http://127.0.0.1:{PORT}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return list(json.loads(answer.read())["data"]["result"])

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()
