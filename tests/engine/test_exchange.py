"""What workers make of their gradients together: against their mean in float64, and without a warning of DDP's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from tests.engine.test_state import WIDE, train_state

WORKERS = 2
UNIT = 2.0**-8
"""Largest relative error of a value rounded to bf16, which has 8 significant bits."""


def start(worker: Any, *arguments: Any) -> None:
    start_processes(worker, arguments, nprocs=WORKERS, start_method="forkserver")


def join(rank: int, folder: Path) -> None:
    """Begins a group that ends with its process.

    Where `destroy_process_group` came first, DDP could be the group's last owner, and its end wait for a thread of the
    group that waits for it.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)


def gradients(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """By a parameter's name; through DDP they are exchanged."""
    network.train()
    network.zero_grad()
    network(images).square().sum().backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def compare_with_the_mean(rank: int, folder: Path, number_format: str) -> None:
    join(rank, folder)
    state = train_state(WIDE, world_size=WORKERS, train={"gradient_exchange": number_format})
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    own = gradients(state.model, images)
    found = gradients(state.network, images)
    again = gradients(state.network, images)
    rebuilt = gradients(train_state(WIDE, world_size=WORKERS, train={"gradient_exchange": number_format}).network, images)
    assert own.keys() == found.keys() and len(own) > 20
    # In bf16: once on each worker, once in their sum; halving is exact. In float32 the sum alone.
    bound = (1 + UNIT) ** 2 - 1 if number_format == "bf16" else 2.0**-23
    for name, gradient in own.items():
        of_all = [torch.empty_like(gradient) for _ in range(WORKERS)]
        dist.all_gather(of_all, gradient)
        each = torch.stack(of_all).double()
        error, size = (found[name] - each.mean(0)).abs(), each.abs().mean(0)
        assert (error <= bound * size + 1e-30).all(), f"{name}: off by {(error / size).max()}"
        assert torch.equal(found[name], again[name]) and torch.equal(found[name], rebuilt[name]), name
    values = sum(gradient.numel() for gradient in own.values())
    assert state.gradient_bytes == values * (2 if number_format == "bf16" else 4)
    goes_through_bf16 = all(torch.equal(gradient, gradient.bfloat16().float()) for gradient in found.values())
    assert goes_through_bf16 == (number_format == "bf16")


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_workers_get_the_mean_of_their_gradients(tmp_path, number_format):
    start(compare_with_the_mean, tmp_path, number_format)


def train_on_one_image(rank: int, folder: Path) -> None:
    join(rank, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = train_state(world_size=WORKERS)
        gradients(state.network, torch.ones(1, 3, 8, 8))
    assert [str(warning.message) for warning in caught if "stride" in str(warning.message)] == []


def test_ddp_finds_the_strides_of_its_buckets(tmp_path):
    start(train_on_one_image, tmp_path)
