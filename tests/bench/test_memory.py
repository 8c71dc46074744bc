import pytest
import torch

from prelora_ray.bench.memory import Options, split_batches
from prelora_ray.errors import UserError
from tests.command import prelora_here


def test_every_whole_split_of_a_batch_is_measured():
    assert split_batches(Options(batches=(6, 8), micro_batches=(2, 3, 8))) == [(6, 2), (6, 3), (8, 2), (8, 8)]
    with pytest.raises(UserError, match="--micro-batch 3 is not allowed with --batch 8: it must divide it"):
        split_batches(Options(batches=(8,), micro_batches=(3, 5)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_a_machine_without_gpu_is_told_so():
    done = prelora_here("bench", "memory")
    assert done.returncode == 2
    assert done.stderr == "prelora: prelora bench memory needs a GPU, and there is none: a CPU's allocator tells of no peak\n"
