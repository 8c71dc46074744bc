"""Writes docs/metrics.md from the metrics' own descriptions: `python docs/make_metrics.py`."""

from pathlib import Path

from prelora_ray.monitor.metrics import RunMetrics, WorkerMetrics

HEAD = """# Metrics

What the exporter serves at `/metrics`; written by `python docs/make_metrics.py`. The exporter is a detached actor on
the cluster's head that reserves no CPU, started by the first run and shared by all. It listens on loopback, port 9464,
unless `monitor.host` and `monitor.port` say otherwise; where the port is taken it uses the next free one, and the run
says so. It also says so in `prelora-exporter-<port>.json` in Ray's folder for temporary files (`/tmp/ray`), which
`dashboards/prometheus/prometheus.yml` follows: all exporters of a machine are found, whichever port they have.
`/healthz` answers `ok`; all else is 404.

Every worker sends all of its values about once a second, in a group of n > 128 every n / 128 seconds, and never waits
for an answer. So a lost message costs nothing, and an exporter that died has all values again once each worker has
sent. Workers that leave the group are dropped at once, silent ones after 60 s; a finished run's
last values stay for 5 minutes.

`run` is the path or address of the run's folder, such as `/mnt/shared/runs/digits`, which no two runs share. Workers'
counters begin anew with each attempt, as Prometheus expects of a process that was restarted.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
"""


def reference() -> str:
    rows = []
    for metrics in (RunMetrics(), WorkerMetrics()):
        for collector in metrics.registry._collector_to_names:
            name = collector._name + ("_total" if collector._type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in collector._labelnames)
            rows.append(f"| `{name}` | {collector._type} | {labels} | {collector._documentation} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("metrics.md").write_text(reference())
