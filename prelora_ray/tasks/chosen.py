"""The one place where a task is chosen: by a recipe's `task`."""

from __future__ import annotations

from prelora_ray.tasks.classification import Classification
from prelora_ray.tasks.masked_language import MaskedLanguage
from prelora_ray.tasks.task import Task

TASKS: dict[str, type[Task]] = {"classification": Classification, "mlm": MaskedLanguage}
