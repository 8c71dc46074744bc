"""A run at MLflow: at the server, and in the experiment, that MLflow's own environment variables name."""

from __future__ import annotations

import os
import re

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from prelora_ray.config import Settings
from prelora_ray.monitor.scalars import Pixels, Scalars, settings_in_words
from prelora_ray.monitor.tracker import Outcome

_TAG = "prelora.run"
_STEPS_OF = "loss/train"
"""Every step has it."""
_STATUS: dict[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "stop": "KILLED"}
_NOT_IN_KEYS = re.compile(r"[^\w\-. :/]")
_PARAMS = 100
"""That a request may hold."""


class MLflowRun:
    def __init__(self, settings: Settings, identity: str) -> None:
        """Finds the run by the tag that holds its identity, or begins it."""
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "prelora")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        runs = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{identity}'", max_results=1)
        run = runs[0] if runs else self._client.create_run(experiment, run_name=settings.name, tags={_TAG: identity})
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        if not run.data.params:  # later ones may differ, which MLflow refuses
            params = [Param(_NOT_IN_KEYS.sub("_", key), value) for key, value in settings_in_words(settings).items()]
            for start in range(0, len(params), _PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _PARAMS])
        self.last_step = max((entry.step for entry in self._client.get_metric_history(self._id, _STEPS_OF)), default=0)

    def scalars(self, step: int, values: Scalars, seconds: float) -> None:
        """A metric of the same step, time and value is one to MLflow."""
        self._client.log_batch(self._id, [Metric(tag, value, int(seconds * 1e3), step) for tag, value in values.items()])

    def samples(self, step: int, page: Pixels) -> None:
        self._client.log_image(self._id, page, f"samples/{step:05d}.png")

    def end(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._id, _STATUS[outcome])
