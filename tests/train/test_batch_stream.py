from __future__ import annotations

import pytest

from prelora_ray.train.batch_stream import share_of_decoders


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "decoders"),
    [(2, 0, 1, 2), (2, 0, 2, 1), (1, 0, 3, 1), (16, 1, 1, 15), (128, 8, 8, 15), (128, 8, 1, 15), (32, 2, 1, 15), (4, 4, 4, 1)],
)
def test_a_worker_decodes_on_its_share_of_the_node(cpus, gpus, workers, decoders):
    """As if each of the node's GPUs had a worker, of this run or of another."""
    assert share_of_decoders(cpus, gpus, workers) == decoders
