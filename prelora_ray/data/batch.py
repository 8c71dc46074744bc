"""What a worker gets of each global batch, and what it takes to stream it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prelora_ray.data.manifest import Manifest, Split
from prelora_ray.data.order import Ids, Order, max_worker_cells, worker_cells

if TYPE_CHECKING:
    import torch  # readers and decoders do without, which saves each of them seconds and memory


@dataclass(frozen=True)
class Batch:
    """This worker's slice of one global batch: its cells, padded to the same n slots on every worker."""

    split: Split
    epoch: int
    batch: int
    tensors: dict[str, torch.Tensor]
    """By name, what decoders have made of the rows; n is the first dimension of each."""
    ids: Ids
    """(n,): sample ids, -1 where a slot is empty."""

    @property
    def count(self) -> int:
        """Samples in it."""
        return int((self.ids >= 0).sum())


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. A GPU is not waited for: that would leave it idle until the next step is launched."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


Columns = dict[str, pa.DataType]
"""What is read of each row: columns by name, and what they are read as."""
Arrays = dict[str, NDArray[np.generic]]
"""By name, arrays with a row for each slot."""
Decoder = Callable[[Split, int, Ids, Mapping[str, pa.Array]], Arrays]
"""Takes split, epoch, sample ids (n,), -1 where a slot is empty, and the columns of the filled slots, in order."""


class Rows(Protocol):
    """What the rows of a prepared folder are, and what decoders make of them: `image_rows.py`, `token_rows.py`."""

    @property
    def columns(self) -> Columns: ...
    def row_bytes(self, split: Split, epoch: int) -> int:
        """Bytes of a decoded row in an epoch."""

    @property
    def all_row_bytes(self) -> set[int]:
        """Those of all epochs."""

    def decoder(self) -> Decoder:
        """Made once in each decoder's process. All that it draws follows from (seed, epoch, sample); it raises
        UndecodableError for a row that is not what `prepare` has stored."""


@dataclass(frozen=True)
class StreamPlan:
    """What a worker streams: everything that the read task and the decoders need, and nothing that is open."""

    path: str
    manifest: Manifest
    orders: dict[Split, Order]
    rows: Rows
    rank: int
    world_size: int

    @property
    def _order(self) -> Order:
        """Any of the orders: all of them have the same cells."""
        return next(iter(self.orders.values()))

    @property
    def cells(self) -> range:
        """Cells of every batch that this worker serves."""
        return worker_cells(self.rank, self.world_size, self._order.num_cells)

    @property
    def num_slots(self) -> int:
        return max_worker_cells(self.world_size, self._order.num_cells) * self._order.cell

    def batches_per_block(self, row_bytes: int) -> int:
        """A block costs tens of milliseconds on its way, so small rows travel several batches to a block."""
        rows = min(2048, max(128, 19_200_000 // row_bytes))
        return max(1, rows // self.num_slots)


class Pass(NamedTuple):
    """The rest of one split's epoch, from a batch on."""

    split: Split
    epoch: int
    first_batch: int = 0
