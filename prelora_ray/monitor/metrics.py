"""Every metric that a run exports, named in one place. Units are base units; every series carries its run."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

STEP_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the step times' histogram, in seconds."""


class _Metrics:
    """Metrics of one source of a run, which sends all of them, cumulative, each time."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)

    def collect(self) -> list[Metric]:
        return list(self.registry.collect())

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"prelora_{name}", text, ("run", *labels), registry=self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"prelora_{name}", text, ("run", *labels), registry=self.registry)


class WorkerMetrics(_Metrics):
    """What each worker measures of itself."""

    def __init__(self) -> None:
        super().__init__()
        labels = ("worker", "phase")
        self.images = self._counter("images", "Training images that went through the model.", labels)
        self.images_per_second = self._gauge(
            "images_per_second", "Training images a second over the last seconds; only of the phase that trains.", labels
        )
        self.step_seconds = Histogram(
            "prelora_step_seconds",
            "Time from one optimizer step's end to the next one's.",
            ("run", *labels),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self.data_wait_seconds = self._counter("data_wait_seconds", "Time spent waiting for the next batch.", labels)
        self.exchange_seconds = self._counter(
            "exchange_seconds",
            "Time spent waiting for the mean of all workers' gradients, behind the worker's own backward pass; who holds up "
            "the others waits least.",
            labels,
        )
        self.mfu = self._gauge("mfu_ratio", "Share of the GPU's peak that the model's own operations make use of.", labels)
        self.gpu_utilization = self._gauge("gpu_utilization_ratio", "Share of the time in which a kernel ran.", ["worker"])
        self.gpu_power = self._gauge("gpu_power_watts", "Power that the GPU draws.", ["worker"])
        self.gpu_memory_bytes = self._gauge("gpu_memory_bytes", "GPU memory: allocated, reserved, peak.", (*labels, "kind"))


class RunMetrics(_Metrics):
    """What rank 0 knows of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.phase_info = self._gauge("phase_info", "1 for the phase that the run is in, 0 for the others.", ["phase"])
        self.epoch = self._gauge("epoch", "Completed epochs.")
        self.epochs = self._gauge("epochs", "Epochs of the whole run.")
        self.remaining_seconds = self._gauge("remaining_seconds", "Time to the run's end at the pace of its last epochs.")
        self.loss = self._gauge("loss", "Mean training loss of the epoch so far.")
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the base.")
        self.trainable_parameters = self._gauge("trainable_parameters", "Parameters that train.")
        self.norm_change = self._gauge(
            "norm_change_percent", "Norm change of a family over the last step of the test.", ["family"]
        )
        self.loss_change = self._gauge("loss_change_percent", "Loss change over the last step of the test.")
        self.threshold = self._gauge("threshold_percent", "Thresholds of the test.", ["kind"])
        self.adapter_rank = self._gauge("adapter_rank", "Rank of a module's adapter.", ["module"])
        self.val_top1 = self._gauge("val_top1_ratio", "Top-1 accuracy of the last validation, 0 to 1.")
        self.val_accuracy = self._gauge(
            "val_accuracy_ratio", "Share of masked tokens guessed right in the last validation, 0 to 1."
        )
        self.val_perplexity = self._gauge("val_perplexity", "Perplexity of masked tokens in the last validation.")
        self.val_loss = self._gauge("val_loss", "Loss of the last validation.")
        self.world_size = self._gauge("world_size", "Workers of the group.")
        self.restarts = self._counter("restarts", "Times that the group was started again, by cause.", ["cause"])
        self.checkpoint_seconds = self._gauge("checkpoint_seconds", "Duration of the last save, from snapshot to commit.")
        self.checkpoint_time = self._gauge("checkpoint_timestamp_seconds", "Time of the last commit, in seconds since 1970.")
        self.diagnosis = self._gauge("diagnosis_info", "1 for each failure signature that the run shows.", ["signature"])


def merged(sources: Iterable[list[Metric]]) -> list[Metric]:
    """One family a name, with the samples of all sources."""
    families: dict[str, Metric] = {}
    for source in sources:
        for metric in source:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples.extend(sample for sample in metric.samples if not sample.name.endswith("_created"))
    return list(families.values())
