"""What a run may begin with: another run, a checkpoint, an export, a timm file."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from prelora_ray.config_file import parse_settings
from prelora_ray.engine.state import TrainState
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.method.phases import Phase
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.checks import check_num_classes
from prelora_ray.train.initial_weights import initial_weights
from tests.engine.test_state import enter, train_a_step, train_state


@pytest.fixture
def run(tmp_path) -> tuple[Path, TrainState]:
    """A run of ten classes in phase lora, with adapters that do something, after epochs 3 and 4."""
    state, folder = train_state(), RunFolder(tmp_path / "run")
    folder.make()
    folder.write_settings(state.settings)
    folder.write_json("data.json", {"classes": [str(i) for i in range(10)], "fingerprint": ""})
    enter(state, Phase.LORA)
    checkpoints = Checkpoints(folder)
    for state.epoch in (3, 4):
        for seed in range(2):
            state.refresh()
            train_a_step(state, 10 * state.epoch + seed)
        checkpoints.save(state.snapshot([], holds_base=checkpoints.holds_base))
    return tmp_path / "run", state


@torch.no_grad()
def test_a_run_begins_with_what_another_one_computes(run, tmp_path):
    """With its adapters merged, whether it is named itself, or its newest checkpoint, or what was exported of it."""
    folder, state = run
    images = torch.randn(4, 3, 8, 8)
    state.refresh()
    expected = state.model.eval()(images)
    (tmp_path / "out/timm").mkdir(parents=True)
    safetensors.torch.save_file(initial_weights(str(folder)), tmp_path / "out/timm/model.safetensors")
    sources = [folder, folder / "checkpoints/00004-000000", tmp_path / "out", tmp_path / "out/timm"]
    for source in map(str, [*sources, tmp_path / "out/timm/model.safetensors"]):
        begun = begin(source, num_classes=10)
        torch.testing.assert_close(begun.model.eval()(images), expected, rtol=0, atol=1e-5)
        assert begun.pretrained_notes == []
    earlier = begin(str(folder / "checkpoints/00003-000000"), num_classes=10)
    assert (earlier.model.eval()(images) - expected).abs().max() > 1e-3


def test_a_head_of_another_number_of_classes_is_begun_anew_and_told(run):
    folder, state = run
    begun, drawn = begin(str(folder), num_classes=7), train_state()
    (told,) = begun.pretrained_notes
    assert told == f"{folder}: its head has 10 classes and this run 7: the head starts anew"
    assert begun.model.head.weight.shape[0] == 7
    assert torch.equal(begun.model.cls_token, state.model.cls_token)
    assert not torch.equal(begun.model.cls_token, drawn.model.cls_token)
    assert torch.equal(begun.ema.tensors()["cls_token"], state.model.cls_token)  # which the average begins with too


def begin(source: str, num_classes: int) -> TrainState:
    content = train_state().settings.model_dump()
    content["model"]["init_from"], content["train"]["ema"] = source, 0.9
    return TrainState(parse_settings(content), num_classes, 1, torch.device("cpu"), 1, initial=initial_weights(source))


def test_what_cannot_be_begun_with_is_told(run, tmp_path):
    folder, _ = run
    for name in Checkpoints(RunFolder(folder)).names():
        (folder / "checkpoints" / name / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.init_from = '.*run' is not allowed: '.*run' has no whole checkpoint yet"):
        initial_weights(str(folder))
    with pytest.raises(UserError, match=r"model\.init_from = '.*nothing' is no file: give a timm checkpoint, .* a run or an"):
        initial_weights(str(tmp_path / "nothing"))


def test_the_data_must_have_the_classes_that_a_recipe_says():
    def settings(num_classes):
        return parse_settings({"name": "x", "data": {"path": "d"}, "model": {"num_classes": num_classes}})

    check_num_classes(settings(None), 2)
    check_num_classes(settings(2), 2)
    with pytest.raises(UserError, match=r"^model\.num_classes = 3 is not allowed: 'd' has 2 classes; leave it out"):
        check_num_classes(settings(3), 2)
