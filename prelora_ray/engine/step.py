"""One optimizer step over a global batch, and evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prelora_ray.data.batch import Batch, StreamPlan, to_device
from prelora_ray.engine.cuda_graph import CudaGraph, Inputs
from prelora_ray.engine.drop_path import draw_drop_path, set_drop_path
from prelora_ray.engine.exchange import ExchangeClock
from prelora_ray.engine.micro_batch import FoundSizes, find_micro_batch, micro_batch_sizes
from prelora_ray.engine.optim import set_learning_rate
from prelora_ray.engine.state import TrainState
from prelora_ray.method.phases import Phase
from prelora_ray.tasks.chosen import TASKS
from prelora_ray.tasks.task import Evaluation, Forward

_SHOWN = 36
"""Images, about so many of which `shown_images` shows."""
_OF_STEP = {"scale", "step", "filled", "drop_path"}
"""Inputs that are a step's own; the task's have a row for each slot."""


class NonFiniteLossError(RuntimeError):
    """Loss or gradient is no finite number: going on would only spoil the weights."""


class TrainStep:
    """Takes a worker's slice of each global batch through the model, and keeps the epoch's sums on the device."""

    def __init__(self, state: TrainState, plan: StreamPlan) -> None:
        self.state = state
        self.plan = plan
        self.task = TASKS[state.settings.task](state.settings, plan.manifest, state.dtype)
        self._sums = torch.zeros(2, dtype=torch.float64, device=state.device)
        self._bad_step = torch.full((), -1, device=state.device)
        self.exchange_clock = ExchangeClock(state.device)
        self.found_sizes: FoundSizes = {}
        """What `search` found."""
        self.begin_epoch()

    def begin_epoch(self, sums: Sequence[float] = (0, 0)) -> None:
        """Begins to sum anew, from this worker's `sums` where the epoch was begun before."""
        self._sums.copy_(torch.tensor(sums, dtype=self._sums.dtype))
        self._bad_step.fill_(-1)
        self.learning_rate = 0.0

    @property
    def micro_batch(self) -> int:
        """Images that this worker takes through the model at once."""
        size, share = self.state.settings.train.micro_batch, self.plan.num_slots
        if size == "auto":
            size = self.found_sizes.get(self._stage, share)
        return share if size is None else min(size, share)

    @property
    def wants_search(self) -> bool:
        """Whether the largest micro-batch of this phase and size of images is to be found first."""
        is_auto = self.state.settings.train.micro_batch == "auto" and self.state.device.type == "cuda"
        return is_auto and self._stage not in self.found_sizes

    @property
    def _stage(self) -> tuple[Phase, int]:
        """What decides how much memory an image takes: the phase, and the image's size."""
        return self.state.phases.phase, self.state.image_size

    def search(self, batch: Batch) -> None:
        """Finds the largest micro-batch that fits in this phase, over a batch. All workers call it together."""
        state, share = self.state, self.plan.num_slots
        self._graph = None  # that of the steps before, which holds the memory of one
        state.network.train()
        inputs = {name: to_device(tensor, state.device) for name, tensor in self._inputs(batch).items()}

        def backward(size: int) -> None:
            self._add_gradients(inputs, range(0, min(2 * size, share), size), exchanges=False)

        sizes = micro_batch_sizes(share, self.plan.orders["train"].cell)
        self.found_sizes[self._stage] = find_micro_batch(state, sizes, backward)

    def train(self, batch: Batch) -> None:
        """One optimizer step. The gradient is the mean over the global batch, whoever serves which part."""
        state = self.state
        position = state.step, state.batches, state.phases.phase, state.switch_step
        self.learning_rate = set_learning_rate(state.optimizer, state.settings, *position)
        state.network.train()
        inputs = {name: to_device(tensor, state.device) for name, tensor in self._inputs(batch).items()}
        if not state.uses_cuda_graph:
            self._step(inputs)
            return
        graph_of = state.optimizer, state.image_size  # a change of phase builds a new optimizer
        if self._graph is None or self._graph_of != graph_of:
            self._graph, self._graph_of = CudaGraph(self._step), graph_of
        self._graph(inputs)

    _graph: CudaGraph | None = None
    _graph_of: tuple[torch.optim.Optimizer, int] | None = None

    def shown_images(self, batch: Batch) -> npt.NDArray[np.uint8] | None:
        """Images of a batch's first cells as the model takes them, augmented and mixed: (n, size, size, channels). None
        where the task has no images."""
        cell = self.plan.orders["train"].cell
        first = slice(0, cell * max(1, _SHOWN // cell))
        drawn = self.task.draw(batch, self.plan.cells, cell)
        shown = self.task.shown({name: tensor[first] for name, tensor in drawn.items()})
        return None if shown is None else shown[:_SHOWN].numpy()

    def _inputs(self, batch: Batch) -> Inputs:
        """All that a step depends on but the state, as tensors on the CPU."""
        state, order = self.state, self.plan.orders["train"]
        inputs = {
            **self.task.draw(batch, self.plan.cells, order.cell),
            # DDP takes the mean over workers, so that is undone.
            "scale": torch.tensor(state.world_size / self._count(batch), dtype=state.dtype),
            "step": torch.tensor(state.step),
        }
        if state.batch_norm is not None:
            inputs["filled"] = torch.from_numpy(batch.ids >= 0)
        if state.drop_path:
            key = (state.settings.train.seed, batch.epoch, batch.batch, self.plan.cells, order.cell)
            inputs["drop_path"] = draw_drop_path(state.drop_path, *key, len(batch.ids)).float()
        return inputs

    def _count(self, batch: Batch) -> int:
        """What the loss of a global batch is the mean over."""
        return self.plan.orders["train"].batch_size(batch.batch) * self.task.counts_per_sample

    def _step(self, inputs: Inputs) -> None:
        state = self.state
        self._sums += self._add_gradients(inputs, range(0, self.plan.num_slots, self.micro_batch), exchanges=True)
        norm = self._clip()
        self._bad_step.copy_(torch.where((self._bad_step < 0) & ~norm.isfinite(), inputs["step"], self._bad_step))
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.batch_norm is not None:
            state.batch_norm.update(self.plan.cells, self.plan.orders["train"].num_cells)
        if state.ema is not None:
            state.ema.update()

    def _add_gradients(self, inputs: Inputs, starts: range, *, exchanges: bool) -> torch.Tensor:
        """Takes the micro-batches that begin at `starts` through the model and back; sums of their losses and counts.

        `exchanges`: whether workers exchange their gradients, after the last of them.
        """
        state = self.state
        state.refresh()
        sums = torch.zeros_like(self._sums)
        drop_path = inputs.get("drop_path")
        if state.batch_norm is not None:
            state.batch_norm.begin()
        for start in starts:
            micro = slice(start, start + starts.step)
            set_drop_path(state.drop_path, None if drop_path is None else drop_path[:, micro])
            is_parallel, is_last = isinstance(state.network, DistributedDataParallel), exchanges and start == starts[-1]
            with (
                state.network.no_sync() if is_parallel and not is_last else nullcontext(),  # type: ignore[operator]
                self._learning(inputs, micro),
            ):
                of_slots = {name: tensor[micro] for name, tensor in inputs.items() if name not in _OF_STEP}
                loss, count = self.task.loss(self._forward(state.network), of_slots)
                scaled = loss * inputs["scale"]
                with self.exchange_clock.watching(scaled) if is_parallel and is_last else nullcontext():
                    scaled.backward()
            sums += torch.stack([loss.detach(), count])
        set_drop_path(state.drop_path, None)
        return sums

    def _learning(self, inputs: Inputs, micro: slice) -> AbstractContextManager[None]:
        """For the time of a micro-batch, in which batch norm learns of its cells."""
        if self.state.batch_norm is None:
            return nullcontext()
        return self.state.batch_norm.learning(inputs["filled"][micro].view(-1, self.plan.orders["train"].cell))

    def check_finite(self) -> None:
        """Raises NonFiniteLossError where a step since `begin_epoch` had a gradient that is not finite.

        The gradient is the same on every worker, so all raise alike.
        """
        step = int(self._bad_step)
        if step >= 0:
            epoch, batch = divmod(step, self.state.batches)
            raise NonFiniteLossError(
                f"the loss is not finite at step {step} (epoch {epoch}, batch {batch}) in phase {self.state.phases.phase}"
            )

    def local_loss(self) -> float:
        """Mean training loss of this worker since `begin_epoch`; waits for the device."""
        loss, count = self._sums.tolist()
        return float(loss / count) if count else 0.0

    def worker_sums(self) -> list[list[float]]:
        """Loss sum and count since the epoch's begin of every worker, by rank; all workers call it together."""
        return all_gather(self._sums)

    def epoch_sums(self) -> tuple[float, int]:
        """Sum of the training losses since `begin_epoch` and their count, over all workers."""
        loss, count = all_reduce(self._sums).tolist()
        return loss, int(count)

    def evaluate(self, batches: Iterable[Batch]) -> list[Evaluation]:
        """Measures over all workers' slices, every sample counted once: of the model, and of its average."""
        state = self.state
        state.model.eval()
        state.refresh()
        networks = [state.model, *([state.ema.model] if state.ema is not None else [])]
        evaluators = [self.task.evaluator(state.device) for _ in networks]
        runs = [
            evaluator.run(self._forward(network), own, self.micro_batch)
            for evaluator, network, own in zip(evaluators, networks, itertools.tee(batches, len(networks)), strict=True)
        ]
        for _ in zip(*runs, strict=True):  # batch by batch, so that no more than one is held
            pass
        return [evaluator.result(all_reduce(evaluator.sums)) for evaluator in evaluators]

    def _forward(self, network: nn.Module) -> Forward:
        def forward(*inputs: torch.Tensor) -> torch.Tensor:
            with self.state.autocast():
                outputs: torch.Tensor = network(*inputs)
            return outputs

        return forward

    def _clip(self) -> torch.Tensor:
        """Clips the gradient and returns the norm that it had."""
        parameters = [parameter for parameter in self.state.model.parameters() if parameter.grad is not None]
        limit = self.state.settings.train.clip_norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm


def all_gather(values: torch.Tensor) -> list[list[float]]:
    """The values of every worker, by rank; all workers call it together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [values.tolist()]
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return [of_one.tolist() for of_one in gathered]


def all_reduce(sums: torch.Tensor) -> torch.Tensor:
    """The sum over all workers, on each of them; what was passed in where there is one worker."""
    sums = sums.clone()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
