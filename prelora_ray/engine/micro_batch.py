"""The largest micro-batch that fits on a GPU, found by trying."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from prelora_ray.engine.state import TrainState
from prelora_ray.method.phases import Phase

SPARE_SHARE = 0.04
"""Share of the GPU's memory that is to stay free: memory comes in pieces, and libraries take some of their own."""
_PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FoundSizes = dict[tuple[Phase, int], int]
"""Images at once, by phase and side of the images in pixels."""


class MemoryShortageError(RuntimeError):
    """Not even the smallest micro-batch fits on the GPU of every worker."""


def micro_batch_sizes(num_slots: int, cell: int) -> list[int]:
    """Sizes that split a worker's slots into ever more parts, in whole cells, the largest first and one cell last."""
    cells = num_slots // cell
    return sorted({cell * -(-cells // parts) for parts in _PARTS} | {cell}, reverse=True)


def find_micro_batch(state: TrainState, sizes: Sequence[int], backward: Callable[[int], None]) -> int:
    """The largest of the `sizes`, in falling order, with which `backward` fits on the GPU of every worker.

    `backward` takes the first micro-batches of a size through the model and adds up their gradients, without exchanging
    them. All workers call this together. Raises MemoryShortageError, on all of them, where no size fits.
    """
    size = next((size for size in sizes if _fits(state, size, backward)), 0)
    smallest = torch.tensor(size, device=state.device)
    if dist.is_initialized():
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    if not smallest:
        gib = torch.cuda.get_device_properties(state.device).total_memory / 2**30
        raise MemoryShortageError(
            f"data.cell = {sizes[-1]} is not allowed on a GPU of {gib:.0f} GiB: phase {state.phases.phase} needs more memory "
            "for so many images; take fewer, a smaller model, or a GPU that nothing else uses"
        )
    return int(smallest)


def bytes_to_spare(state: TrainState, total: int) -> int:
    """What a step must leave free of a GPU of `total` bytes: room for a snapshot, which stays until it is written, some
    spare memory, and before the first step, which makes them, the optimizer's moments.
    """
    moments = 0 if state.optimizer.state else state.moment_bytes()
    return int(SPARE_SHARE * total) + state.snapshot_bytes() + moments


def _fits(state: TrainState, size: int, backward: Callable[[int], None]) -> bool:
    try:
        _try(state, size, backward)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    state.optimizer.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(state.device)
    if not fits:
        torch._dynamo.reset()  # or the next size would be compiled as one of many
    return fits


def _try(state: TrainState, size: int, backward: Callable[[int], None]) -> None:
    total = torch.cuda.get_device_properties(state.device).total_memory
    reserved = torch.empty(bytes_to_spare(state, total), dtype=torch.uint8, device=state.device)
    stream = torch.cuda.Stream(state.device)
    stream.wait_stream(torch.cuda.current_stream(state.device))
    with torch.cuda.stream(stream):  # autograd remembers the stream, and a CUDA graph must not find the default one
        backward(size)
    torch.cuda.synchronize(state.device)
    del reserved
