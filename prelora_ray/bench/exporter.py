"""The exporter under the load of a large run."""

from __future__ import annotations

import statistics
import time
import urllib.request
from typing import Any

import torch

from prelora_ray.bench.machine import describe
from prelora_ray.monitor.client import Client
from prelora_ray.monitor.exporter import start_exporter
from prelora_ray.monitor.metrics import WorkerMetrics
from prelora_ray.ray_session import ray_session


def _worker_metrics(rank: int) -> WorkerMetrics:
    """A worker's counters, its histogram (15 buckets and 3 more series) and a gauge."""
    metrics = WorkerMetrics()
    labels = ("bench", str(rank), "full")
    metrics.images.labels(*labels).inc(1000)
    metrics.images_per_second.labels(*labels).set(1000)
    metrics.step_seconds.labels(*labels).observe(0.1)
    return metrics


def bench_exporter(workers: int, seconds: int) -> dict[str, Any]:
    """Has `workers` send 20 series each once a second: how long a message holds up its worker, and a scrape takes."""
    with ray_session():
        messages, scrapes, size = _measure(workers, seconds)
    rows = [
        {"name": name, "median_ms": statistics.median(took) * 1e3, "most_ms": max(took) * 1e3}
        for name, took in (("message", messages), ("scrape", scrapes))
    ]
    options = {"workers": workers, "seconds": seconds}
    return {"benchmark": "exporter", **describe(torch.device("cpu")), "options": options, "scrape_bytes": size, "rows": rows}


def _measure(workers: int, seconds: int) -> tuple[list[float], list[float], int]:
    """Seconds of each message and of each scrape, and the bytes of the largest."""
    address = start_exporter("127.0.0.1", 9464)
    metrics = [_worker_metrics(rank) for rank in range(workers)]
    clients = [Client("bench", str(rank), own) for rank, own in enumerate(metrics)]
    messages, scrapes, sizes = [], [], []
    for _ in range(seconds):
        begin = time.perf_counter()
        for client in clients:
            start = time.perf_counter()
            client.send(workers)
            messages.append(time.perf_counter() - start)
        time.sleep(max(0.0, 0.5 - (time.perf_counter() - begin)))
        start = time.perf_counter()
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            sizes.append(len(answer.read()))
        scrapes.append(time.perf_counter() - start)
        time.sleep(max(0.0, 1.0 - (time.perf_counter() - begin)))
    return messages, scrapes, max(sizes)
