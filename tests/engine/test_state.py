"""The state of a run: checked at the switch, copied for a save, and built anew so that it sums as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from prelora_ray.config_file import parse_settings
from prelora_ray.engine import prelora as prelora_module
from prelora_ray.engine.fp8 import Fp8Mlp
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.method import adapters
from prelora_ray.method.phases import Phase
from prelora_ray.storage import Storage
from tests.runs import TINY_VIT, assert_same_bits

CPU = torch.device("cpu")


def train_state(
    options=TINY_VIT, world_size: int = 1, checkpoint: Snapshot | None = None, train: dict[str, Any] | None = None
) -> TrainState:
    settings = parse_settings(
        {
            "name": "state",
            "data": {"path": "x", "batch_size": 8, "cell": 4},
            "model": {"name": "vit_tiny_patch16_224", "image_size": 8, "options": options},
            "train": {"epochs": 20, "ramp_epochs": 0, **(train or {})},
            "method": {"r_max": 8},
        }
    )
    return TrainState(settings, 10, 1, CPU, world_size, checkpoint)


def enter(state: TrainState, phase: Phase) -> None:
    state.enter(phase, {target.name: 4 for target in state.targets})


def train_a_step(state: TrainState, seed: int) -> dict[str, torch.Tensor]:
    """One step on images drawn by a seed; its gradients."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(state.dtype)
    state.network.train()
    state.network(images).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}
    state.optimizer.step()
    state.optimizer.zero_grad()
    return gradients


@pytest.mark.parametrize("value", [0.01, torch.nan])
def test_a_switch_that_changes_an_output_is_an_error(monkeypatch, value):
    def inject(model, *args):
        adapters.inject(model, *args)
        for b in adapters.lora_layers(model)["blocks.2.mlp.fc1"].lora_B.values():
            b.data.fill_(value)

    monkeypatch.setattr(prelora_module, "inject", inject)
    state = train_state()
    with pytest.raises(RuntimeError, match="injecting the adapters changed a logit by"):
        enter(state, Phase.WARMUP)


@pytest.mark.parametrize("phase", Phase)
def test_nothing_changes_a_snapshot(phase):
    state = train_state()
    enter(state, phase)
    train_a_step(state, seed=0)
    snapshot = state.snapshot([], holds_base=False)
    kept = copy.deepcopy(snapshot)
    assert bool(kept.base) == (phase is Phase.LORA) and bool(kept.adapter) == (phase is not Phase.FULL)
    train_a_step(state, seed=1)
    moments = [tensor for entry in state.optimizer.state.values() for tensor in entry.values()]
    with torch.no_grad():
        for tensor in (*state.model.state_dict().values(), *moments):
            tensor.fill_(7)  # in place, what is frozen too
    state.phases.end_epoch(0, {target.name: 1.0 for target in state.targets}, 1.0)
    assert_same_bits(snapshot, kept)


@pytest.mark.parametrize("phase", Phase)
def test_lamb_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path, phase):
    """Through the files, in every phase: base and adapters have counts of steps of their own."""
    train = {"optimizer": "lamb", "layer_decay": 0.75, "precision": "fp64"}
    state = train_state(train=train)
    train_a_step(state, seed=0)
    enter(state, phase)
    state.refresh()
    train_a_step(state, seed=1)
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(state.snapshot([], holds_base=False))
    resumed = train_state(train=train, checkpoint=checkpoints.load(checkpoints.names()[-1]))
    for each in (state, resumed):
        each.refresh()
        train_a_step(each, seed=2)
    found = resumed.snapshot([], holds_base=False)
    assert_same_bits(found, state.snapshot([], holds_base=False))
    counts = {name: int(entry["step"]) for name, entry in found.optimizer.items()}
    assert counts["head.weight"] == 3
    assert all(count == 2 for name, count in counts.items() if ".lora_" in name)


@pytest.mark.parametrize("phase", Phase)
def test_no_change_of_phase_is_to_come_in_a_runs_own_snapshot(phase):
    """As it would be in a trunk's, which a fork begins with."""
    state = train_state()
    enter(state, phase)
    resumed = train_state(checkpoint=state.snapshot([], holds_base=False))
    assert resumed.fork is None and resumed.phases.phase is phase
    assert_same_bits(resumed.snapshot([], holds_base=False), state.snapshot([], holds_base=False))


@pytest.mark.parametrize(("fp8_from", "changes"), [("full", False), ("warmup", True)])
def test_a_fork_tells_the_change_of_logits_that_a_straight_run_does(fp8_from, changes):
    train = {"precision": "fp8", "fp8_from": fp8_from}
    straight = train_state(train=train)
    checkpoint = straight.snapshot([], holds_base=False)
    enter(straight, Phase.WARMUP)
    checkpoint.state |= {"phases": straight.phases.state_dict(), "fork": True}
    fork = train_state(train=train, checkpoint=checkpoint)
    assert fork.phases.phase is Phase.WARMUP
    assert fork.logit_change == straight.logit_change
    assert (straight.logit_change > 0) == changes


def test_fp8_from_phase_full_goes_through_all_phases():
    """Adapters come in as exactly as ever, and a snapshot has the names and values that one in bf16 has."""
    bf16, fp8 = (train_state(train={"precision": precision, "fp8_from": "full"}) for precision in ("bf16", "fp8"))
    for phase in Phase:
        if phase is not Phase.FULL:
            enter(bf16, phase)
            enter(fp8, phase)
            assert fp8.logit_change is not None and fp8.logit_change < 0.05
        assert_same_bits(fp8.snapshot([], holds_base=False), bf16.snapshot([], holds_base=False))
        assert all(isinstance(block.mlp, Fp8Mlp) for block in fp8.model.blocks)
        fp8.refresh()
        gradients = train_a_step(copy.deepcopy(fp8), seed=0)
        trained = {name for name, parameter in fp8.model.named_parameters() if parameter.requires_grad}
        assert gradients.keys() == trained == {n for n, p in bf16.model.named_parameters() if p.requires_grad}


def test_a_snapshot_leaves_out_the_base_that_the_run_folder_holds():
    state = train_state()
    enter(state, Phase.WARMUP)
    assert not state.snapshot([], holds_base=False).base  # it still trains
    enter(state, Phase.LORA)
    whole, rest = (state.snapshot([], holds_base=held) for held in (False, True))
    frozen = {name for name, parameter in state.model.named_parameters() if not parameter.requires_grad}
    assert set(whole.base) == frozen and not rest.base
    assert set(whole.model) == set(rest.model) and not frozen & set(rest.model)
    assert whole.refers_to_base and rest.refers_to_base


WIDE = {"patch_size": 2, "embed_dim": 192, "depth": 2, "num_heads": 2}
"""3.6 MB of parameters, which DDP sums in one bucket at first, and in two from its second step on."""


def go_on_as_if_undisturbed(rank: int, folder: Path, gradient_exchange: str) -> None:
    """What one of three workers does: with two, a sum is the same in either order."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    state = train_state(WIDE, 3, None, {"gradient_exchange": gradient_exchange})
    train_a_step(state, rank)
    resumed = train_state(WIDE, 3, state.snapshot([], holds_base=False), {"gradient_exchange": gradient_exchange})
    expected, found = (train_a_step(each, 3 + rank) for each in (state, resumed))
    assert expected.keys() == found.keys() == dict(state.model.named_parameters()).keys()
    different = [name for name, gradient in expected.items() if not torch.equal(gradient, found[name])]
    assert not different
    assert_same_bits(state.snapshot([], holds_base=False), resumed.snapshot([], holds_base=False))
    assert len(state.network._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")) > 1
    dist.destroy_process_group()


@pytest.mark.parametrize("gradient_exchange", ["fp32", "bf16"])
def test_a_state_built_anew_sums_gradients_as_the_one_before(tmp_path, gradient_exchange):
    """To the bit, over several buckets, though DDP arranges them anew after its first backward."""
    start_processes(go_on_as_if_undisturbed, (tmp_path, gradient_exchange), nprocs=3, start_method="forkserver")
