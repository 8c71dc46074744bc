"""A run at Weights & Biases: as its own environment variables say, such as WANDB_MODE and WANDB_PROJECT."""

from __future__ import annotations

import os

import wandb

from prelora_ray.config import Settings, flat
from prelora_ray.monitor.scalars import Pixels, Scalars
from prelora_ray.monitor.tracker import Outcome
from prelora_ray.run_folder import RunFolder


class WandbRun:
    def __init__(self, folder: RunFolder, settings: Settings, identity: str) -> None:
        """Goes on with the run of that id, or begins it. What it keeps on a disk lies in the run folder, if that does.

        Offline it cannot know what was logged before, and each attempt's files hold all steps from the first one on.
        """
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "prelora"),
            id=identity,
            name=settings.name,
            resume="allow",
            config=flat(settings),
            allow_val_change=True,
            dir=folder.path if folder.is_local else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.last_step = self._run.step - 1

    def scalars(self, step: int, values: Scalars, seconds: float) -> None:
        """A step that was committed is not taken again."""
        self._run.log(values, step=step, commit=True)

    def samples(self, step: int, page: Pixels) -> None:
        self._run.log({"samples": wandb.Image(page.squeeze())}, step=step, commit=False)

    def end(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
