import pytest

from prelora_ray.train.attempt import _own_sums

SUMS = [[1.5, 8.0], [2.25, 12.0], [4.0, 4.0]]
"""Loss sum and images of three workers."""


def test_as_many_workers_go_on_with_their_own_sums():
    assert [_own_sums(SUMS, rank, 3) for rank in range(3)] == [(1.5, 8), (2.25, 12), (4, 4)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_another_number_of_workers_counts_every_sum_once(world_size):
    assert [_own_sums(SUMS, rank, world_size) for rank in range(world_size)] == [(7.75, 24), *[(0, 0)] * (world_size - 1)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_begins_without_sums(world_size):
    assert [_own_sums([], rank, world_size) for rank in range(world_size)] == [(0, 0)] * world_size
