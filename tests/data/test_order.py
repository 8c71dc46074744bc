"""Every sample once, none dropped, for any sizes, cells, worker counts and start positions."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ray.data.order import Order, first_rows, max_worker_cells, worker_cells

orders = st.builds(
    Order,
    row_groups=st.lists(st.integers(1, 40), min_size=1, max_size=30).map(tuple),
    num_cells=st.integers(1, 24),
    cell=st.integers(1, 9),
    seed=st.one_of(st.none(), st.integers(0, 2**40)),
    buffer=st.integers(1, 8),
)


def epoch_of(order: Order, epoch: int, world_size: int = 1) -> list[np.ndarray]:
    """The ids of each worker."""
    return [order.epoch(epoch, worker_cells(rank, world_size, order.num_cells)) for rank in range(world_size)]


def batch_of(order: Order, ids: list[np.ndarray], batch: int) -> np.ndarray:
    """The global batch as the cells of all workers, in cell order, empty slots included."""
    parts, world_size = [], len(ids)
    for rank in range(world_size):
        cells = worker_cells(rank, world_size, order.num_cells)
        slots = order.slots(ids[rank], batch, cells, max_worker_cells(world_size, order.num_cells) * order.cell)
        assert (slots[len(cells) * order.cell :] == -1).all()
        parts.append(slots[: len(cells) * order.cell])
    return np.concatenate(parts)


@given(orders, st.integers(0, 1000))
def test_every_sample_once_an_epoch(order, epoch):
    ids = epoch_of(order, epoch)
    batches = [batch_of(order, ids, batch) for batch in range(order.num_batches)]
    seen = np.concatenate(batches)
    assert sorted(seen[seen >= 0]) == list(range(order.num_rows))
    sizes = [int((batch >= 0).sum()) for batch in batches]
    assert [order.batch_size(batch) for batch in range(order.num_batches)] == sizes
    assert [order.rows_from(batch) for batch in range(order.num_batches)] == [sum(sizes[i:]) for i in range(len(sizes))]
    assert order.batch_size(order.num_batches) == order.rows_from(order.num_batches) == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 900))
def test_the_first_rows_keep_their_ids_and_row_groups(row_groups, num_rows):
    found = first_rows(row_groups, num_rows)
    assert sum(found) == min(num_rows, sum(row_groups))
    assert list(found[:-1]) == row_groups[: len(found) - 1] and 0 < found[-1] <= row_groups[len(found) - 1]


@given(orders, st.integers(0, 1000), st.data())
def test_any_number_of_workers_sees_the_same_batch(order, epoch, data):
    world_size = data.draw(st.integers(1, order.num_cells))
    batch = data.draw(st.integers(0, order.num_batches - 1))
    ids = epoch_of(order, epoch, world_size)
    assert np.array_equal(np.concatenate(ids), *epoch_of(order, epoch))
    assert np.array_equal(batch_of(order, ids, batch), batch_of(order, epoch_of(order, epoch), batch))
    rest = [order.ids_from(ids[r], batch, worker_cells(r, world_size, order.num_cells)) for r in range(world_size)]
    batches = np.concatenate([batch_of(order, ids, later) for later in range(batch, order.num_batches)])
    assert sorted(np.concatenate(rest)) == sorted(batches[batches >= 0])


@given(st.integers(1, 200), st.data())
def test_workers_share_out_the_cells_evenly(num_cells, data):
    world_size = data.draw(st.integers(1, num_cells))
    cells = [worker_cells(rank, world_size, num_cells) for rank in range(world_size)]
    assert [cell for part in cells for cell in part] == list(range(num_cells))
    sizes = [len(part) for part in cells]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == max_worker_cells(world_size, num_cells)


@given(orders)
def test_streams_differ_by_at_most_one_row_and_fill_from_the_front(order):
    rows = [sum(b - a for a, b in (order.cell_span(i, c) for i in range(order.num_batches))) for c in range(order.num_cells)]
    assert max(rows) - min(rows) <= 1
    for batch in range(order.num_batches - 2):
        assert order.batch_size(batch) == order.num_cells * order.cell


def test_order_follows_from_seed_and_epoch_alone():
    make = lambda seed: Order((7,) * 20, 4, 3, seed, 2)  # noqa: E731
    assert np.array_equal(epoch_of(make(1), 5), epoch_of(make(1), 5))
    assert not np.array_equal(epoch_of(make(1), 5), epoch_of(make(1), 6))
    assert not np.array_equal(epoch_of(make(1), 5), epoch_of(make(2), 5))


@pytest.mark.parametrize(
    ("order", "epoch", "world_size", "digest"),
    [
        (Order((4, 3), 2, 2, None), 0, 1, "d5703fa7be8070ad"),
        (Order((7,) * 20, 4, 3, 1, 2), 5, 3, "6968c02b5d636c1b"),
        (Order(tuple(range(1, 60)), 24, 9, 0), 0, 5, "6ab397afa5fef970"),
        (Order(tuple(1 + i * i % 37 for i in range(300)), 16, 16, 2**40, 8), 299, 7, "567ea03913100fbb"),
        (Order((*(31,) * 1000, 2), 256, 16, 0), 1, 64, "c268769e07c3ea22"),
        (Order((1,) * 3, 24, 9, 3, 5), 2, 8, "4e2e2b0b74630133"),
    ],
)
def test_the_order_of_a_run_that_was_begun_stays_what_it_was(order, epoch, world_size, digest):
    """Bit for bit: a run that resumes goes on in the order that it was begun with."""
    ids = epoch_of(order, epoch, world_size)
    content = hashlib.sha256(np.concatenate(ids).astype("<i8").tobytes())
    for batch in range(order.num_batches):
        for rank in range(world_size):
            cells = worker_cells(rank, world_size, order.num_cells)
            slots = order.slots(ids[rank], batch, cells, max_worker_cells(world_size, order.num_cells) * order.cell)
            content.update(slots.astype("<i8").tobytes())
        content.update(order.batch_size(batch).to_bytes(8, "little"))
    assert content.hexdigest()[:16] == digest


def test_by_hand_without_a_seed():
    """Seven rows, two cells of two: streams are rows 0-2 and 3-6."""
    order = Order((4, 3), num_cells=2, cell=2, seed=None)
    ids = order.epoch(0, [0, 1])
    assert order.num_batches == 2
    assert order.slots(ids, 0, [0, 1], 4).tolist() == [0, 1, 3, 4]
    assert order.slots(ids, 1, [0, 1], 4).tolist() == [2, -1, 5, 6]
    assert [order.batch_size(b) for b in range(2)] == [4, 3]
    assert order.epoch(0, [1]).tolist() == [3, 4, 5, 6]
    assert order.slots(order.epoch(0, [1]), 1, [1], 2).tolist() == [5, 6]


def test_rows_of_a_buffer_stay_together():
    """With a buffer of two row groups the first 2 x 10 rows come from two row groups alone."""
    ids = Order((10,) * 12, 1, 10, 3, buffer=2).epoch(0, [0])
    for i in range(0, 120, 20):
        assert len(set(ids[i : i + 20] // 10)) == 2
    assert not np.array_equal(np.sort(ids[:20]), ids[:20])


def test_empty_row_groups_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Order((3, 0), 1, 1, 0)
