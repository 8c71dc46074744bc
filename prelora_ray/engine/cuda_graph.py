"""A training step as one CUDA graph: thousands of kernel launches become one."""

from __future__ import annotations

from collections.abc import Callable

import torch

Inputs = dict[str, torch.Tensor]

_EAGER_CALLS = 3
"""Calls in front of the capture, in which libraries set themselves up and compiled code is made."""


class CudaGraph:
    """Calls `function` on tensors of fixed shapes: at first as it is, then as a replayed CUDA graph.

    What `function` changes (weights, moments, sums) it must change in place, and it may neither wait
    for the device nor depend on anything but its tensors. A small ViT on a fast GPU is bound by
    launches without it; a large one gains little.
    """

    def __init__(self, function: Callable[[Inputs], None]) -> None:
        self._function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: Inputs = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, inputs: Inputs) -> None:
        if self._graph is None and self._calls < _EAGER_CALLS:
            self._calls += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # autograd remembers the stream, and must not find the default one
                self._function(inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._static = {name: tensor.clone() for name, tensor in inputs.items()}
            self._graph = torch.cuda.CUDAGraph()
            # Other threads (metrics, checkpoints) may ask the device for something meanwhile.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._function(self._static)
        for name, tensor in inputs.items():
            self._static[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
