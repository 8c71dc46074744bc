"""The average of the weights: by hand, through all phases, and from a checkpoint on."""

from __future__ import annotations

import pytest
import torch

from prelora_ray.engine.state import TrainState, restore_model
from prelora_ray.engine.step import TrainStep
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.method.adapters import lora_layers, merged_state_dict
from prelora_ray.method.phases import Phase
from prelora_ray.storage import Storage
from prelora_ray.train.batch_stream import stream_plan
from tests.engine.test_state import enter, train_a_step, train_state
from tests.engine.test_step import IDS, MANIFEST, batch, settings
from tests.runs import assert_same_bits

DECAY = 0.8


def averaging(**train) -> TrainState:
    return train_state(train={"ema": DECAY, **train})


def step(state: TrainState, seed: int) -> dict[str, torch.Tensor]:
    """A step, which the average takes in; the merged weights after it."""
    state.refresh()
    train_a_step(state, seed)
    state.ema.update()
    return {name: tensor.clone() for name, tensor in merged_state_dict(state.model).items()}


def test_it_is_the_sum_by_hand_over_the_merged_weights_of_all_phases():
    """decay**n W_0 + (1 - decay) sum of decay**(n - i) W_i, in float64."""
    state = averaging(precision="fp64")
    weights = [{name: tensor.clone() for name, tensor in state.model.state_dict().items()}]
    for phase in Phase:
        if phase is not Phase.FULL:
            enter(state, phase)
            assert all(layer.lora_B for layer in lora_layers(state.model).values())
        weights += [step(state, len(weights) + i) for i in range(3)]
    num_steps, found = len(weights) - 1, state.ema.tensors()
    assert found.keys() == weights[0].keys()
    for name, average in found.items():
        by_hand = DECAY**num_steps * weights[0][name]
        for i in range(1, num_steps + 1):
            by_hand += (1 - DECAY) * DECAY ** (num_steps - i) * weights[i][name]
        assert average.dtype == torch.float64
        assert (average - by_hand).abs().max() < 1e-14, name
    last = weights[-1]["blocks.0.attn.qkv.weight"]
    assert not torch.equal(last, weights[-4]["blocks.0.attn.qkv.weight"])  # the adapters move what is frozen


@pytest.mark.parametrize("phase", Phase)
def test_from_a_checkpoint_on_it_has_the_same_bits(tmp_path, phase):
    state = averaging()
    enter(state, phase)
    step(state, 0)
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(state.snapshot([], holds_base=False))
    saved = checkpoints.load(checkpoints.names()[-1])
    resumed = train_state(train={"ema": DECAY}, checkpoint=saved)
    for each in (state, resumed):
        step(each, 1)
    assert_same_bits(resumed.snapshot([], holds_base=False), state.snapshot([], holds_base=False))
    assert not torch.equal(state.ema.tensors()["head.weight"], saved.ema["head.weight"])
    restored = restore_model(state.settings, 10, saved, ema=True)
    assert all(torch.equal(tensor, saved.ema[name]) for name, tensor in restored.state_dict().items())


def test_a_change_of_phase_leaves_it_as_it_is_and_a_fork_takes_it_over():
    trunk = averaging()
    step(trunk, 0)
    checkpoint = trunk.snapshot([], holds_base=False)
    enter(trunk, Phase.WARMUP)
    checkpoint.state |= {"phases": trunk.phases.state_dict(), "fork": True}
    fork = train_state(train={"ema": DECAY}, checkpoint=checkpoint)
    for state in (trunk, fork):
        assert all(torch.equal(tensor, checkpoint.ema[name]) for name, tensor in state.ema.tensors().items())
        step(state, 1)
    assert_same_bits(fork.snapshot([], holds_base=False), trunk.snapshot([], holds_base=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph takes a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_cuda_graph_averages_as_steps_without_one_do(tmp_path, optimizer):
    """Through all phases. LAMB has no graph, and says so by `uses_cuda_graph`."""
    ends = []
    for cuda_graph in (False, True):
        train = {"ema": DECAY, "optimizer": optimizer, "cuda_graph": cuda_graph, "compile": False, "layer_decay": 0.75}
        run = settings(tmp_path, **train)
        state = TrainState(run, 10, 10**6, torch.device("cuda"), 1)
        step = TrainStep(state, stream_plan(run, MANIFEST, 0, 1))
        assert state.uses_cuda_graph == (cuda_graph and optimizer == "adamw")
        for phase in Phase:
            enter(state, phase)
            for _ in range(6):  # three of them in front of the capture
                step.train(batch(IDS))
                state.batch += 1
        ends.append({name: tensor.clone() for name, tensor in state.ema.tensors().items()})
    for name, average in ends[0].items():
        torch.testing.assert_close(ends[1][name], average, rtol=0, atol=1e-7)
    assert (ends[0]["head.weight"] - state.model.head.weight).abs().max() > 1e-6


def test_a_snapshots_bytes_count_it():
    with_, without = averaging(), train_state()
    assert without.ema is None and without.snapshot([], holds_base=False).ema == {}
    copied = sum(tensor.nbytes for tensor in with_.snapshot([], holds_base=False).ema.values())
    assert with_.snapshot_bytes() - without.snapshot_bytes() == copied > 0
