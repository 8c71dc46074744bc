"""What a worker gets of each global batch, and what it takes to stream it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from prelora_ray.data.augment import Augmentation
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
    images: torch.Tensor
    """(n, size, size, 3), uint8, of the size that the epoch trains on."""
    labels: torch.Tensor
    """(n,), int64, -1 where a slot is empty."""
    ids: Ids
    """(n,): sample ids, -1 where a slot is empty."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. A GPU is not waited for: that would leave it idle until the next step is launched."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class StreamPlan:
    """What a worker streams: everything that the read task and the decoders need, and nothing that is open."""

    path: str
    manifest: Manifest
    orders: dict[Split, Order]
    augmentation: Augmentation
    """Of evaluation, and of training where the epoch has none of its own."""
    seed: int
    crop_ratio: float
    rank: int
    world_size: int
    training_augmentations: Mapping[int, Augmentation] = field(default_factory=dict)
    """By epoch, where training has another one than evaluation."""

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

    @property
    def augmentations(self) -> set[Augmentation]:
        """All that any epoch takes."""
        return {self.augmentation, *self.training_augmentations.values()}

    def augmentation_of(self, split: Split, epoch: int) -> Augmentation:
        """What an epoch takes, whose images have this one's size."""
        return self.training_augmentations.get(epoch, self.augmentation) if split == "train" else self.augmentation

    def batches_per_block(self, image_size: int) -> int:
        """A block costs tens of milliseconds on its way, so small images travel several batches to a block."""
        rows = min(2048, max(128, 6_400_000 // image_size**2))
        return max(1, rows // self.num_slots)


class Pass(NamedTuple):
    """The rest of one split's epoch, from a batch on."""

    split: Split
    epoch: int
    first_batch: int = 0
