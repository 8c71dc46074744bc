"""What a task is: what a batch's tensors mean to a model, and how the model is evaluated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from prelora_ray.config import Settings
from prelora_ray.data.batch import Batch, Rows, to_device
from prelora_ray.data.manifest import Manifest

Inputs = dict[str, torch.Tensor]
"""By name, tensors with a row for each slot."""
Forward = Callable[..., torch.Tensor]
"""The network, in the number format of its phase."""


@dataclass(frozen=True)
class Evaluation(ABC):
    """What an evaluation comes to. An epoch records each number that it has a field `val_<name>` for."""

    loss: float
    """The mean over what is counted."""

    @property
    @abstractmethod
    def told(self) -> str:
        """All of it, for a person."""


class Evaluator(ABC):
    """Sums over batches, kept on the device until they are asked for."""

    def __init__(self, num_sums: int, device: torch.device) -> None:
        self.device = device
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
        """Of this worker."""

    @torch.no_grad()
    def run(self, forward: Forward, batches: Iterable[Batch], micro_batch: int) -> Iterator[int]:
        """Takes the network through all batches, `micro_batch` samples at a time; yields the samples of each."""
        for batch in batches:
            for start in range(0, len(batch.ids), micro_batch):
                micro = slice(start, start + micro_batch)
                self.add(forward, {name: to_device(tensor[micro], self.device) for name, tensor in batch.tensors.items()})
            yield batch.count

    @abstractmethod
    def add(self, forward: Forward, tensors: Mapping[str, torch.Tensor]) -> None:
        """Counts some slots of a batch, whose tensors are on the device."""

    @abstractmethod
    def result(self, sums: torch.Tensor) -> Evaluation:
        """What `sums` come to: this worker's own, or those of all."""


class Task(ABC):
    counts_per_sample: int
    """What each sample adds to the count of `loss`. As it is the same for each, every worker knows that of the global
    batch."""

    @abstractmethod
    def __init__(self, settings: Settings, manifest: Manifest, dtype: torch.dtype) -> None:
        """`dtype`: of what the loss is computed in."""

    @staticmethod
    @abstractmethod
    def rows(settings: Settings, manifest: Manifest) -> Rows:
        """What the rows of a prepared folder are, and what decoders make of them."""

    @abstractmethod
    def draw(self, batch: Batch, cells: Sequence[int], cell: int) -> Inputs:
        """All that a batch's loss depends on but the model, on the CPU: its tensors, and what is drawn for its cells.

        `cells`: their numbers in the global batch, with `cell` slots each.
        """

    @abstractmethod
    def loss(self, forward: Forward, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses of whole cells on the device, and their count; empty slots count nothing."""

    def shown(self, inputs: Inputs) -> torch.Tensor | None:
        """The images that `loss` takes of whole cells, to look at: uint8 (n, height, width, channels). None of a task
        without images."""
        return None

    @abstractmethod
    def evaluator(self, device: torch.device) -> Evaluator:
        """A new one, for the run's own model or its average."""
