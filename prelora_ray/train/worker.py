"""The loop that every worker runs, through all phases in one process."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import ray.train.torch

from prelora_ray.config_file import parse_settings
from prelora_ray.engine.micro_batch import MemoryShortageError
from prelora_ray.engine.precision import check_precision
from prelora_ray.engine.step import NonFiniteLossError
from prelora_ray.fault_tolerance.failure import own_failures
from prelora_ray.train.attempt import StoppedError, WorkerAttempt


def train_worker(config: dict[str, Any]) -> None:
    """Trains from the newest whole checkpoint, or from the start, to the end of the run.

    Ray Train calls this on every worker, and again after each failure or resize. `config["settings"]`
    holds the run's settings, and `config["reports_epochs"]` whether somebody hears of each epoch.
    """
    with own_failures(lambda: None):
        settings = parse_settings(config["settings"])
        check_precision(settings.train.precision, ray.train.torch.get_device())
        attempt = WorkerAttempt(settings, reports_epochs=config["reports_epochs"])
    with closing(attempt), own_failures(lambda: attempt.state.step):
        try:
            for epoch in range(attempt.state.epoch, attempt.settings.train.epochs):
                attempt.begin_epoch()
                for batch in attempt.stream.take("train", epoch):
                    attempt.step(batch)
                loss = attempt.mean_loss()
                validations = attempt.validate(epoch)
                decision = attempt.decide(epoch, loss)
                attempt.end_epoch(epoch, validations, decision)
            attempt.finish()
        except StoppedError:
            pass
        except (NonFiniteLossError, MemoryShortageError) as error:
            # The same on every worker and on every retry, so no retry helps.
            attempt.fail(str(error))
