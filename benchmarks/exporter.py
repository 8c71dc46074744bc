"""The exporter under the load of a large run: `python benchmarks/exporter.py [--workers N] [--seconds N]`.

N workers send 20 series each, once a second. Prints how long a message holds up its worker, and a scrape takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import urllib.request

import ray

from prelora_ray.monitor.client import Client
from prelora_ray.monitor.exporter import start_exporter
from prelora_ray.monitor.metrics import WorkerMetrics


def worker_metrics(rank: int) -> WorkerMetrics:
    """A worker's counters, its histogram (15 buckets and 3 more series) and a gauge."""
    metrics = WorkerMetrics()
    labels = ("bench", str(rank), "full")
    metrics.images.labels(*labels).inc(1000)
    metrics.images_per_second.labels(*labels).set(1000)
    metrics.step_seconds.labels(*labels).observe(0.1)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=20)
    options = parser.parse_args()
    ray.init("local", include_dashboard=False, logging_level="ERROR")
    address = start_exporter("127.0.0.1", 9464)
    metrics = [worker_metrics(rank) for rank in range(options.workers)]
    clients = [Client("bench", str(rank), own) for rank, own in enumerate(metrics)]
    messages, scrapes, sizes = [], [], []
    for _ in range(options.seconds):
        begin = time.perf_counter()
        for client in clients:
            start = time.perf_counter()
            client.send(options.workers)
            messages.append(time.perf_counter() - start)
        time.sleep(max(0.0, 0.5 - (time.perf_counter() - begin)))
        start = time.perf_counter()
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            sizes.append(len(answer.read()))
        scrapes.append(time.perf_counter() - start)
        time.sleep(max(0.0, 1.0 - (time.perf_counter() - begin)))
    result = {
        "workers": options.workers,
        "message_ms": {"median": 1e3 * statistics.median(messages), "99 %": 1e3 * statistics.quantiles(messages, n=100)[98]},
        "scrape_ms": {"median": 1e3 * statistics.median(scrapes), "most": 1e3 * max(scrapes)},
        "scrape_bytes": max(sizes),
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, Ray {ray.__version__}",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
