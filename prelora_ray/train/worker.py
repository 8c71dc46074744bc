"""The loop that every worker runs, through all phases in one process."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from prelora_ray.config_file import parse_settings
from prelora_ray.engine.micro_batch import MemoryShortageError
from prelora_ray.engine.precision import PrecisionError, check_precision
from prelora_ray.engine.step import NonFiniteLossError
from prelora_ray.fault_tolerance.failure import own_failures
from prelora_ray.train.attempt import Session, StoppedError


def train_worker(config: dict[str, Any]) -> None:
    """Trains from the newest whole checkpoint, or from the start, to the end of the run.

    Ray Train calls this on every worker, and again after each failure or resize. `config["settings"]`
    holds the run's settings.
    """
    with own_failures(lambda: None):
        session = Session(parse_settings(config["settings"]))
    with closing(session), own_failures(lambda: session.state.step):
        try:
            check_precision(session.settings.train.precision, session.state.device)
            for epoch in range(session.state.epoch, session.settings.train.epochs):
                session.begin_epoch()
                for batch in session.feed.take("train", epoch):
                    session.step(batch)
                loss = session.mean_loss()
                validation = session.validate(epoch)
                decision = session.decide(epoch, loss)
                session.end_epoch(epoch, loss, validation, decision)
            session.finish()
        except StoppedError:
            pass
        except (NonFiniteLossError, PrecisionError, MemoryShortageError) as error:
            # The same on every worker and on every retry, so no retry helps.
            session.fail(str(error))
