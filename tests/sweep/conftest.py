"""One trunk that the tests of this folder fork from."""

from __future__ import annotations

import pytest

from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import train
from tests.runs import settings


@pytest.fixture(scope="session")
def trunk(digits, storage):
    """Full training with a checkpoint of every epoch."""
    method = {"enabled": False, "window_epochs": 1, "windows": 2}
    run = settings(digits, storage, "trunk", 1, method=method, checkpoint={"keep_trunk": True})
    train(run)
    return RunFolder.of(run)
