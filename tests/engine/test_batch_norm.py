"""Batch norm over cells: by hand in float64, against torch's and timm's own, whoever serves which cells; resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from prelora_ray.config import ModelSettings, Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch
from prelora_ray.engine.batch_norm import CellBatchNorm2d, CellStatistics, cell_moments, cell_norms, running_statistics
from prelora_ray.engine.check import check_model
from prelora_ray.engine.model import create_model, timm_model
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.method.adapters import merged_state_dict
from prelora_ray.method.phases import Phase
from prelora_ray.storage import Storage
from prelora_ray.torchvision_ops import make_importable
from prelora_ray.train.batch_stream import stream_plan
from tests.engine.test_step import MANIFEST
from tests.runs import assert_same_bits

make_importable()

from timm.layers import BatchNormAct2d  # noqa: E402

CELL, CHANNELS, SIDE = 4, 3, 5
FILLED = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
RESNET = {"layers": (1, 1, 1, 1), "channels": (4, 6, 8, 10), "stem_type": "deep", "stem_width": 4}


def norm_of(kind: type[nn.BatchNorm2d] = nn.BatchNorm2d, **options) -> nn.BatchNorm2d:
    norm = kind(CHANNELS, **options).double()
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    return norm


def images(number: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(number, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).double()
    return (x + 3).requires_grad_()


def test_moments_by_hand():
    x = images(16)
    mean, variance, count = cell_moments(x.detach(), FILLED)
    for cell, (of_cell, filled) in enumerate(zip(x.detach().view(4, CELL, CHANNELS, -1).numpy(), FILLED.numpy(), strict=True)):
        pixels = of_cell[filled].transpose(1, 0, 2).reshape(CHANNELS, -1)
        assert count[cell].item() == pixels.shape[1]
        if filled.any():
            np.testing.assert_allclose(mean[cell], pixels.mean(1), rtol=1e-12)
            np.testing.assert_allclose(variance[cell], pixels.var(1), rtol=1e-12)
    assert not mean[2].any() and not variance[2].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_each_cell_is_normalised_by_itself_with_torchs_gradients(dtype, tolerance):
    """As torch has them of a cell's images alone, in float64; an empty slot is zero, and so is its gradient."""
    norm, x = norm_of(), images(16)
    ours = CellBatchNorm2d(copy.deepcopy(norm).to(dtype))
    ours.filled = FILLED
    narrow = x.detach().to(dtype).requires_grad_()
    y = ours(narrow)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
    y.backward(dy.to(dtype))
    of_cells = zip(x.split(CELL), dy.split(CELL), y.split(CELL), FILLED, strict=True)
    for of_cell, gradient, found, filled in of_cells:
        assert not found[~filled].any()
        if filled.any():
            expected = norm(of_cell[filled])
            expected.backward(gradient[filled])
            torch.testing.assert_close(found[filled].double(), expected, rtol=tolerance, atol=tolerance)
    for found, expected in ((narrow, x), (ours.weight, norm.weight), (ours.bias, norm.bias)):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=tolerance, atol=tolerance)
    assert not narrow.grad[~FILLED.flatten()].any()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_a_batch_of_one_cell_is_torchs_batch_norm(kind):
    """In outputs, gradients and running statistics, over several steps, and then in evaluation to the bit."""
    norm = norm_of(kind, momentum=0.3)
    ours = CellBatchNorm2d(copy.deepcopy(norm))
    model = nn.Sequential(ours)
    statistics = CellStatistics(model)
    for seed in range(3):
        x, same = images(CELL, seed), images(CELL, seed)
        norm(x).square().sum().backward()
        statistics.begin()
        with statistics.learning(torch.ones(1, CELL, dtype=torch.bool)):
            model(same).square().sum().backward()
        statistics.update(range(1), 1)
        torch.testing.assert_close(same.grad, x.grad, rtol=1e-9, atol=1e-9)
    assert ours.state_dict().keys() == norm.state_dict().keys()
    assert ours.num_batches_tracked == 3
    for name, tensor in norm.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    for parameter, expected in zip(ours.parameters(), norm.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-9)
    norm.load_state_dict(ours.state_dict())
    assert torch.equal(model.eval()(images(2)), norm.eval()(images(2)))


def test_running_statistics_follow_the_mean_over_the_batchs_images():
    """Two micro-batches of two cells, by numpy: unbiased variances, an image counting as much in each cell."""
    model = nn.Sequential(CellBatchNorm2d(norm_of()))
    statistics, x = CellStatistics(model), images(16)
    statistics.begin()
    for half, filled in zip(x.split(8), FILLED.split(2), strict=True):
        with statistics.learning(filled):
            model(half)
    statistics.update(range(4), 4)
    pixels = [
        (filled.sum(), of_cell[filled].transpose(1, 0, 2).reshape(CHANNELS, -1))
        for of_cell, filled in zip(x.detach().view(4, CELL, CHANNELS, -1).numpy(), FILLED.numpy(), strict=True)
        if filled.any()
    ]
    mean = sum(images * of_cell.mean(1) for images, of_cell in pixels) / 7
    variance = sum(images * of_cell.var(1, ddof=1) for images, of_cell in pixels) / 7
    np.testing.assert_allclose(model[0].running_mean, 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(model[0].running_var, 0.9 + 0.1 * variance, rtol=1e-12)


def test_compiled_as_a_whole_it_computes_the_same():
    model = nn.Sequential(CellBatchNorm2d(norm_of(BatchNormAct2d)))
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager", fullgraph=True)
    found = []
    for each in (model, compiled):
        statistics, x = CellStatistics(each), images(16)
        statistics.begin()
        for half, filled in zip(x.split(8), FILLED.split(2), strict=True):
            with statistics.learning(filled):
                each(half).square().sum().backward()
        statistics.update(range(4), 4)
        found.append([x.grad, *(parameter.grad for parameter in each.parameters()), *running_statistics(each)])
    for expected, tensor in zip(*found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)


def settings(kind: str = "resnet26", **sections) -> Settings:
    """28 slots in 7 cells, of which 3 workers serve 2, 2 and 3, so that two of them have an empty one more."""
    content = {
        "data": {"path": "x", "batch_size": 28, "cell": CELL},
        "model": {"name": kind, "image_size": 32, "options": RESNET, "drop_path": 0.2},
        "augment": {"mixup": 0.8},
        "method": {"r_min": 2, "r_max": 4},
        "train": {"precision": "fp64", "ramp_epochs": 0, "learning_rate": 0.01, "ema": 0.5},
    }
    for section, keys in sections.items():
        content[section] = content[section] | keys
    return parse_settings({"name": "run", **content})


def train_step(run: Settings, rank: int = 0, world_size: int = 1, checkpoint: Snapshot | None = None) -> TrainStep:
    plan = stream_plan(run, MANIFEST, rank, world_size)
    return TrainStep(TrainState(run, 10, 1, torch.device("cpu"), world_size, checkpoint), plan)


def batch(step: TrainStep, seed: int = 0, empty: int = 0) -> Batch:
    """A worker's part of a batch whose cells have three images each; `empty`: what empty slots hold."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (28, 32, 32, 3), np.uint8)
    ids = np.where(np.arange(28) % 4 < 3, np.arange(28), -1)
    labels = rng.integers(0, 10, 28)
    cells = step.plan.cells
    mine = slice(cells.start * CELL, cells.stop * CELL)
    missing = step.plan.num_slots - len(cells) * CELL
    own = np.concatenate([ids[mine], np.full(missing, -1)])
    parts = [np.concatenate([of[mine], np.zeros((missing, *of.shape[1:]), of.dtype)]) for of in (pixels, labels)]
    parts[0][own < 0], parts[1][own < 0] = empty, -1
    return Batch("train", 0, 0, dict(zip(("images", "labels"), map(torch.from_numpy, parts), strict=True)), own)


def train(step: TrainStep, phases: list[Phase]) -> None:
    for phase in phases:
        step.state.enter(phase, {target.name: 2 for target in step.state.targets})
        for seed in range(2):
            step.train(batch(step, seed))


def tensors_of(step: TrainStep) -> dict[str, torch.Tensor]:
    averages = {f"ema.{name}": tensor for name, tensor in step.state.ema.tensors().items()}
    return {name: tensor.detach().clone() for name, tensor in (step.state.model.state_dict() | averages).items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def train_with_others(rank: int, folder: Path, in_lora: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    step = train_step(settings(model={"batch_norm_in_lora": in_lora}), rank, 3)
    train(step, list(Phase))
    torch.save(tensors_of(step), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("in_lora", ["training", pytest.param("frozen", marks=pytest.mark.slow)])
def test_one_worker_equals_three_and_any_micro_batch(tmp_path, in_lora):
    """In float64 through all phases; and three agree on the running statistics to the bit."""
    start_processes(train_with_others, (tmp_path, in_lora), nprocs=3, start_method="forkserver")
    of_three = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for other in of_three[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in of_three[0].items())
    for micro_batch in (None, 3 * CELL):
        step = train_step(settings(model={"batch_norm_in_lora": in_lora}, train={"micro_batch": micro_batch}))
        train(step, list(Phase))
        assert_close(of_three[0], tensors_of(step))
    tracked = [norm.num_batches_tracked.item() for norm in cell_norms(step.state.model)]
    assert set(tracked) == {6 if in_lora == "training" else 4}


@pytest.mark.parametrize(
    ("phase", "in_lora"), [(Phase.FULL, "frozen"), (Phase.WARMUP, "frozen"), (Phase.LORA, "frozen"), (Phase.LORA, "training")]
)
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path, phase, in_lora):
    run = settings(model={"batch_norm_in_lora": in_lora}, train={"precision": "fp32"})
    step = train_step(run)
    train(step, list(Phase)[: list(Phase).index(phase) + 1])
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(step.state.snapshot([], holds_base=False))
    before = [tensor.clone() for tensor in running_statistics(step.state.model)]
    resumed = train_step(run, checkpoint=checkpoints.load(checkpoints.names()[-1]))
    for each in (step, resumed):
        each.train(batch(each, seed=7))
    assert_same_bits(resumed.state.snapshot([], holds_base=False), step.state.snapshot([], holds_base=False))
    is_frozen = phase is Phase.LORA and in_lora == "frozen"
    after = running_statistics(resumed.state.model)
    assert resumed.evaluate([batch(resumed)]) == step.evaluate([batch(step)])
    assert all(torch.equal(one, other) == is_frozen for one, other in zip(before, after, strict=True))


def test_empty_slots_do_not_count():
    """Whatever they hold."""
    found = []
    for empty in (0, 255):
        step = train_step(settings(augment={"mixup": 0}))
        step.train(batch(step, empty=empty))
        found.append(tensors_of(step))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("kind", ["resnet26", "resnet18"])
def test_evaluation_is_that_of_timms_model(kind):
    """With the weights of the run's end; in phase full, whose layers are timm's own, to the bit."""
    step = train_step(settings(kind))
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    for phase in Phase:
        train(step, [phase])
        state = step.state
        state.refresh()
        plain = timm_model(state.settings.model, 10).double().eval()
        plain.load_state_dict(merged_state_dict(state.model))
        torch.testing.assert_close(state.model.eval()(pixels), plain(pixels), rtol=0, atol=0 if phase is Phase.FULL else 1e-9)
        plain.load_state_dict(state.ema.tensors())
        assert torch.equal(state.ema.model(pixels), plain(pixels))


def test_averaged_weights_have_averaged_statistics():
    """A half of those at each step, which is `train.ema` here, by hand."""
    step = train_step(settings())
    expected = [tensor.clone() for tensor in running_statistics(step.state.model)]
    for seed in range(3):
        step.train(batch(step, seed))
        expected = [(tensor + now) / 2 for tensor, now in zip(expected, running_statistics(step.state.model), strict=True)]
    for tensor, average in zip(expected, running_statistics(step.state.ema.model), strict=True):
        torch.testing.assert_close(average, tensor, rtol=1e-12, atol=1e-12)


def test_frozen_statistics_are_those_that_training_goes_by():
    step = train_step(settings(model={"batch_norm_in_lora": "frozen", "drop_path": 0}, augment={"mixup": 0}))
    train(step, [Phase.FULL, Phase.WARMUP])
    model, pixels = step.state.model, torch.randn(4, 3, 32, 32).double()
    assert (model.train()(pixels) - model.eval()(pixels)).abs().max() > 1e-3
    step.state.enter(Phase.LORA)
    step.state.refresh()
    assert torch.equal(model.train()(pixels), model.eval()(pixels))


@pytest.mark.parametrize(
    ("name", "message"),
    [("levit_128s", r"^model\.name = 'levit_128s' is not allowed: .* is a BatchNorm1d, and batch norm is known over images")],
)
def test_batch_norm_over_other_things_than_images_is_refused(name, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        create_model(ModelSettings(name=name), 10, seed=0)


def test_a_cell_of_one_image_is_refused():
    with pytest.raises(UserError, match=r"^data\.cell = 1 is not allowed with model\.name = 'resnet26': it has batch norm"):
        check_model(settings(data={"cell": 1}))
