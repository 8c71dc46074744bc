"""Writes Grafana's dashboards as JSON: `python dashboards/build.py`. Built with Grafana's own SDK."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, BigValueTextMode, ScaleDistribution
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
HERE = Path(__file__).parent / "grafana"
_WORKER = "{{run}} {{worker}}"
_OPERATOR = "{{operator}}"
_TOP1 = "Of the last validation; of text, the share of masked tokens that are guessed right."


def run() -> dashboard.Dashboard:
    """One run: what it learns, how fast it is in each phase, and what happened to it."""
    board = _board("prelora-run", "PreLoRA run", "One run through its phases: loss, test, ranks, speed, memory, restarts.")
    board = board.with_variable(_variable("run", "label_values(prelora_epoch, run)", multi=False))
    for phase, color in (("warmup", "orange"), ("lora", "blue")):
        expression = f'changes(prelora_phase_info{{run="$run", phase="{phase}"}}[1m]) > 0 and prelora_phase_info == 1'
        board = board.annotation(
            dashboard.AnnotationQuery()
            .name(f"{phase} begins")
            .datasource(SOURCE)
            .enable(True)
            .icon_color(color)
            .expr(expression)
        )
    of = '{run="$run"}'
    by_phase = '{run="$run", phase=~".+"}'
    return _with_rows(
        board,
        {
            "Now": [
                _tile("Phase", "What trains.", [(f"prelora_phase_info{of} == 1", "{{phase}}")], text=BigValueTextMode.NAME),
                _tile(
                    "Epoch",
                    "Completed epochs, and those of the whole run.",
                    [(f"prelora_epoch{of}", "done"), (f"prelora_epochs{of}", "of")],
                    text=BigValueTextMode.VALUE_AND_NAME,
                ),
                _tile(
                    "Time left",
                    "At the pace of the last epochs; a phase to come may be faster or slower.",
                    [(f"prelora_remaining_seconds{of}", "left")],
                    unit="s",
                ),
                _tile(
                    "Top-1", _TOP1, [(f"prelora_val_top1_ratio{of} or prelora_val_accuracy_ratio{of}", "")], unit="percentunit"
                ),
                _tile(
                    "Norm change, of tau",
                    "The largest of all families over the threshold: under 100 % the newest step counts as converged.",
                    [(f'max(prelora_norm_change_percent{of}) / max(prelora_threshold_percent{{run="$run", kind="tau"}})', "")],
                    unit="percentunit",
                    warn=1.0,
                ),
                _tile(
                    "Loss change, of zeta",
                    "Over the threshold: up to 100 % the newest step counts as converged.",
                    [(f'max(prelora_loss_change_percent{of}) / max(prelora_threshold_percent{{run="$run", kind="zeta"}})', "")],
                    unit="percentunit",
                    warn=1.0,
                ),
            ],
            "Learning": [
                _panel(
                    "Loss",
                    "Mean of the epoch so far, and of the last validation; perplexity is e to the power of it.",
                    [(f"prelora_loss{of}", "training"), (f"prelora_val_loss{of}", "validation")],
                ),
                _panel(
                    "Top-1", _TOP1, [(f"prelora_val_top1_ratio{of} or prelora_val_accuracy_ratio{of}", "")], unit="percentunit"
                ),
                _panel("Learning rate", "Of the base.", [(f"prelora_learning_rate{of}", "learning rate")], unit="sci"),
                _panel(
                    "Trainable parameters",
                    "They drop at the freeze.",
                    [(f"prelora_trainable_parameters{of}", "parameters")],
                    unit="short",
                ),
            ],
            "Partial convergence test": [
                _panel(
                    "Norm change by family, against tau",
                    "All families have to be under tau in several windows running. The axis is a logarithm.",
                    [
                        (f"prelora_norm_change_percent{of}", "{{family}}"),
                        ('prelora_threshold_percent{run="$run", kind="tau"}', "tau"),
                    ],
                    unit="percent",
                    log=True,
                ),
                _panel(
                    "Loss change, against zeta",
                    "It has to be at most zeta in the same windows.",
                    [
                        (f"prelora_loss_change_percent{of}", "loss"),
                        ('prelora_threshold_percent{run="$run", kind="zeta"}', "zeta"),
                    ],
                    unit="percent",
                ),
                _panel(
                    "Modules by rank",
                    "Once the run has switched.",
                    [(f'count_values("rank", prelora_adapter_rank{of})', "rank {{rank}}")],
                    unit="short",
                ),
            ],
            "Speed and memory by phase": [
                _panel(
                    "Throughput by phase",
                    "All workers together; one series a phase, so that phases can be compared after the fact.",
                    [(f"sum by (phase) (rate(prelora_images_total{by_phase}[$__rate_interval]))", "{{phase}}")],
                    unit="iops",
                ),
                _panel(
                    "Step time by phase, 95 %",
                    "Of all workers' steps.",
                    [
                        (
                            "histogram_quantile(0.95, sum by (le, phase) "
                            f"(rate(prelora_step_seconds_bucket{by_phase}[$__rate_interval])))",
                            "{{phase}}",
                        )
                    ],
                    unit="s",
                ),
                _panel(
                    "Waiting for data",
                    "Share of the workers' time.",
                    [(f"avg by (phase) (rate(prelora_data_wait_seconds_total{by_phase}[$__rate_interval]))", "{{phase}}")],
                    unit="percentunit",
                    warn=0.05,
                ),
                _panel(
                    "GPU memory by phase",
                    "The most of any worker; empty on CPUs.",
                    [(f"max by (phase, kind) (prelora_gpu_memory_bytes{of})", "{{phase}} {{kind}}")],
                    unit="bytes",
                ),
                _panel(
                    "MFU by phase",
                    "Share of the GPU's peak that the model's own operations make use of; empty on CPUs.",
                    [(f"avg by (phase) (prelora_mfu_ratio{of})", "{{phase}}")],
                    unit="percentunit",
                ),
                _panel(
                    "GPU utilization by worker",
                    "Share of the time in which a kernel ran; empty on CPUs.",
                    [(f"prelora_gpu_utilization_ratio{of}", "{{worker}}")],
                    unit="percentunit",
                ),
                _panel(
                    "GPU power by worker",
                    "Empty on CPUs.",
                    [(f"prelora_gpu_power_watts{of}", "{{worker}}")],
                    unit="watt",
                ),
            ],
            "Slow workers": [
                _panel(
                    "Waiting for data by worker",
                    "Share of the worker's time.",
                    [(f"sum by (worker) (rate(prelora_data_wait_seconds_total{of}[$__rate_interval]))", "{{worker}}")],
                    unit="percentunit",
                ),
                _panel(
                    "Computing by worker",
                    "Share of the worker's time: what it waits neither for data nor for gradients.",
                    [
                        (
                            f"sum by (worker) (rate(prelora_step_seconds_sum{of}[$__rate_interval])"
                            f" - rate(prelora_data_wait_seconds_total{of}[$__rate_interval])"
                            f" - rate(prelora_exchange_seconds_total{of}[$__rate_interval]))",
                            "{{worker}}",
                        )
                    ],
                    unit="percentunit",
                ),
                _panel(
                    "Waiting for gradients by worker",
                    "Share of the worker's time. Who lies below the others holds them up; where all are high, the network.",
                    [(f"sum by (worker) (rate(prelora_exchange_seconds_total{of}[$__rate_interval]))", "{{worker}}")],
                    unit="percentunit",
                ),
            ],
            "What happened": [
                _panel("Workers", "The group's size.", [(f"prelora_world_size{of}", "workers")], unit="short"),
                _panel(
                    "Restarts",
                    "By cause, since the run began; empty as long as there was none.",
                    [(f"prelora_restarts_total{of}", "{{cause}}")],
                    unit="short",
                ),
                _panel(
                    "Age of the last checkpoint",
                    "What a crash would cost.",
                    [(f"time() - prelora_checkpoint_timestamp_seconds{of}", "age")],
                    unit="s",
                    warn=600,
                ),
                _panel(
                    "Duration of a save",
                    "From snapshot to commit, beside training.",
                    [(f"prelora_checkpoint_seconds{of}", "seconds")],
                    unit="s",
                ),
            ],
        },
    )


def fleet() -> dashboard.Dashboard:
    """All runs of a cluster."""
    board = _board("prelora-fleet", "PreLoRA fleet", "All runs of a cluster: where they are, how fast, and what they use.")
    board = board.with_variable(_variable("run", "label_values(prelora_epoch, run)", multi=True))
    of = '{run=~"$run"}'
    return _with_rows(
        board,
        {
            "Runs": [
                _panel("Completed epochs", "By run.", [(f"prelora_epoch{of}", "{{run}}")], unit="short"),
                _panel("Training loss", "By run.", [(f"prelora_loss{of}", "{{run}}")]),
                _panel(
                    "Top-1",
                    f"By run. {_TOP1}",
                    [(f"prelora_val_top1_ratio{of} or prelora_val_accuracy_ratio{of}", "{{run}}")],
                    unit="percentunit",
                ),
                _panel("Workers", "By run.", [(f"prelora_world_size{of}", "{{run}}")], unit="short"),
            ],
            "Use": [
                _panel(
                    "Throughput by run",
                    "All workers together.",
                    [(f"sum by (run) (rate(prelora_images_total{of}[$__rate_interval]))", "{{run}}")],
                    unit="iops",
                ),
                _panel(
                    "Workers by phase",
                    "How many train in each phase; their sum over time is GPU-hours by phase.",
                    [(f"sum by (phase) (prelora_world_size{of} * on (run) group_right () prelora_phase_info)", "{{phase}}")],
                    unit="short",
                ),
                _panel(
                    "Restarts in the last hour",
                    "By run and cause; empty as long as there was none.",
                    [(f"increase(prelora_restarts_total{of}[1h])", "{{run}} {{cause}}")],
                    unit="short",
                ),
                _panel(
                    "GPU utilization of nodes",
                    "Ray's own series; empty without GPUs.",
                    [("ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}")],
                    unit="percent",
                ),
            ],
        },
    )


def pipeline() -> dashboard.Dashboard:
    """From disk to the training loop: Ray Data's own series, and what the workers wait for."""
    board = _board("prelora-pipeline", "PreLoRA data pipeline", "Reading, decoding, and whether the workers wait for it.")
    board = board.with_variable(_variable("run", "label_values(prelora_epoch, run)", multi=True))
    board = board.with_variable(_variable("dataset", "label_values(ray_data_bytes_outputs_taken, dataset)", multi=True))
    of, workers = '{dataset=~"$dataset"}', '{run=~"$run"}'
    by = "sum by (dataset, operator)"
    return _with_rows(
        board,
        {
            "What the workers see": [
                _panel(
                    "Waiting for data by worker",
                    "Share of the worker's time. Near 0 the pipeline keeps up, whatever the panels below show.",
                    [(f"sum by (run, worker) (rate(prelora_data_wait_seconds_total{workers}[$__rate_interval]))", _WORKER)],
                    unit="percentunit",
                    warn=0.05,
                ),
                _panel(
                    "Images a second by worker",
                    "What went through the model.",
                    [(f"sum by (run, worker) (rate(prelora_images_total{workers}[$__rate_interval]))", _WORKER)],
                    unit="iops",
                ),
            ],
            "Ray Data": [
                _panel(
                    "Bytes out of each operator",
                    "Encoded images out of the reader, pixels out of the decoders.",
                    [(f"{by} (rate(ray_data_bytes_outputs_taken{of}[$__rate_interval]))", _OPERATOR)],
                    unit="Bps",
                ),
                _panel(
                    "Blocks that wait behind each operator",
                    "Empty behind the decoders while workers wait: decoding is too slow, or reading is.",
                    [(f"{by} (ray_data_num_external_outqueue_blocks{of})", _OPERATOR)],
                    unit="short",
                ),
                _panel(
                    "Decoders",
                    "Processes that are up, by operator.",
                    [(f"{by} (ray_data_num_active_actors{of})", _OPERATOR)],
                    unit="short",
                ),
                _panel(
                    "Time of a task",
                    "Of one block, on average since the start.",
                    [(f"avg by (dataset, operator) (ray_data_average_total_task_completion_time_s{of})", _OPERATOR)],
                    unit="s",
                ),
            ],
            "Nodes": [
                _panel("CPU use", "Of all cores.", [("ray_node_cpu_utilization", "{{ip}}")], unit="percent"),
                _panel(
                    "Object store",
                    "By where the objects lie; spilled ones cost disk traffic.",
                    [("sum by (Location) (ray_object_store_memory)", "{{Location}}")],
                    unit="bytes",
                ),
                _panel("Read from disk", "By node.", [("ray_node_disk_io_read_speed", "{{ip}}")], unit="Bps"),
                _panel("Received from the network", "By node.", [("ray_node_network_receive_speed", "{{ip}}")], unit="Bps"),
            ],
        },
    )


def _board(uid: str, title: str, description: str) -> dashboard.Dashboard:
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["prelora"])
        .time("now-6h", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Data source").type("prometheus"))
    )


def _variable(name: str, query: str, *, multi: bool) -> dashboard.QueryVariable:
    """Refreshed with the time range, so that a run that has ended is in it for as long as the range shows it."""
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(multi)
        .include_all(multi)
    )


def _panel(
    title: str,
    description: str,
    targets: list[tuple[str, str]],
    unit: str = "none",
    warn: float | None = None,
    log: bool = False,
) -> timeseries.Panel:
    panel = _described(timeseries.Panel().span(6).height(8), title, description, unit, warn)
    if log:
        panel = panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    for query in _queries(targets):
        panel = panel.with_target(query)
    return panel


def _tile(
    title: str,
    description: str,
    targets: list[tuple[str, str]],
    unit: str = "none",
    warn: float | None = None,
    text: BigValueTextMode = BigValueTextMode.VALUE,
) -> stat.Panel:
    """The last value, large."""
    panel = _described(stat.Panel().span(4).height(4), title, description, unit, warn)
    panel = panel.text_mode(text).graph_mode(BigValueGraphMode.NONE)
    for query in _queries(targets):
        panel = panel.with_target(query.instant())
    return panel


PanelT = TypeVar("PanelT", stat.Panel, timeseries.Panel)


def _described(panel: PanelT, title: str, description: str, unit: str, warn: float | None) -> PanelT:
    steps = [Threshold(value=None, color="green")] + ([Threshold(value=warn, color="red")] if warn is not None else [])
    thresholds = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    return panel.title(title).description(description).datasource(SOURCE).unit(unit).thresholds(thresholds)


def _queries(targets: list[tuple[str, str]]) -> Iterator[prometheus.Dataquery]:
    for index, (expression, legend) in enumerate(targets):
        yield prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + index))


def _with_rows(board: dashboard.Dashboard, rows: dict[str, list[stat.Panel | timeseries.Panel]]) -> dashboard.Dashboard:
    for title, panels in rows.items():
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def built() -> dict[str, str]:
    """Each dashboard's JSON, by its file's name."""
    boards = {"run.json": run(), "fleet.json": fleet(), "pipeline.json": pipeline()}
    return {name: JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n" for name, board in boards.items()}


if __name__ == "__main__":
    for name, content in built().items():
        (HERE / name).write_text(content)
        print(HERE / name, file=sys.stderr)
