"""One step against a statement of its own: the gradient of the mean loss over the global batch, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch
from prelora_ray.data.manifest import Manifest, Shard
from prelora_ray.data.mixing import plan_mixing
from prelora_ray.engine.drop_path import draw_drop_path, set_drop_path
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import NonFiniteLossError, TrainStep
from prelora_ray.method.phases import Phase
from prelora_ray.train.batch_stream import stream_plan
from tests.runs import TINY_VIT

MANIFEST = Manifest(
    tuple("0123456789"),
    {"train": (Shard("t", (21,), 0, ""),), "val": (Shard("v", (21,), 0, ""),)},
    bad=0,
    settings={},
)


def settings(
    tmp_path: Path,
    channels: int = 3,
    augment: dict[str, float] | None = None,
    drop_path: float = 0.0,
    form: str = "mask",
    method: dict[str, float] | None = None,
    **train,
) -> Settings:
    options = {**TINY_VIT, "in_chans": channels}
    return parse_settings(
        {
            "name": "step",
            "data": {"path": str(tmp_path), "batch_size": 24, "cell": 4},
            "model": {
                "name": "vit_tiny_patch16_224",
                "image_size": 8,
                "options": options,
                "drop_path": drop_path,
                "drop_path_form": form,
            },
            "augment": augment or {},
            "method": {"r_max": 8, **(method or {})},
            "train": {"precision": "fp64", "epochs": 20, "ramp_epochs": 0, "clip_norm": None, **train},
        }
    )


def train_step(settings: Settings) -> TrainStep:
    plan = stream_plan(settings, MANIFEST, 0, 1)
    return TrainStep(TrainState(settings, 10, 1, torch.device("cpu"), 1), plan)


def batch(ids: np.ndarray, size: int = 8) -> Batch:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (len(ids), size, size, 3), np.uint8))
    labels = torch.from_numpy(np.where(ids >= 0, rng.integers(0, 10, len(ids)), -1))
    return Batch("train", 0, 0, {"images": images, "labels": labels}, ids)


IDS = np.array([*range(11), -1, *range(11, 14), -1, *range(14, 17), -1, *range(17, 21)])  # 21 of 24 slots


def gradients_of_a_step(step: TrainStep, content: Batch) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    step.state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.state.model.named_parameters()})
    )
    step.train(content)
    return gradients


@pytest.mark.parametrize(
    ("micro_batch", "channels", "size"), [(None, 3, 8), (4, 3, 8), (8, 3, 8), (16, 3, 8), (8, 1, 8), (8, 3, 6)]
)
def test_gradient_is_the_mean_over_the_global_batch(tmp_path, micro_batch, channels, size):
    train = {"resolution": [{"until": 1, "image_size": size}]}
    step = train_step(settings(tmp_path, channels, micro_batch=micro_batch, **train))
    reference = train_step(settings(tmp_path, channels, **train)).state.model
    content = batch(IDS, size)
    gradients = gradients_of_a_step(step, content)
    filled = torch.from_numpy(IDS >= 0)
    mean = torch.tensor((0.485, 0.456, 0.406), dtype=torch.float64)
    std = torch.tensor((0.229, 0.224, 0.225), dtype=torch.float64)
    pixels = ((content.tensors["images"][filled].double() / 255 - mean) / std).permute(0, 3, 1, 2)
    if channels == 1:
        grey = np.stack([Image.fromarray(image.numpy()).convert("L") for image in content.tensors["images"][filled]])
        pixels = (torch.from_numpy(grey)[:, None].double() / 255 - mean.mean()) / std.mean()
    loss = F.cross_entropy(reference(pixels), content.tensors["labels"][filled])
    loss.backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9)
    assert step.epoch_sums() == (pytest.approx(21 * loss.item(), rel=1e-6), 21)


@pytest.mark.parametrize(("micro_batch", "size"), [(None, 8), (4, 8), (8, 8), (16, 8), (8, 6)])
@pytest.mark.parametrize("form", ["mask", "subset"])
def test_mixing_label_smoothing_and_drop_path_are_the_same_in_every_micro_batch(tmp_path, micro_batch, size, form):
    """Image by image with masks, and the loss as torch's own cross entropy has it."""
    augment = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    steps = {"resolution": [{"until": 1, "image_size": size}]}
    run = settings(tmp_path, augment=augment, drop_path=0.5, form=form, micro_batch=micro_batch, **steps)
    step, content = train_step(run), batch(IDS, size)
    reference = train_step(settings(tmp_path, drop_path=0.5, **steps)).state
    gradients = gradients_of_a_step(step, content)

    key = (run.train.seed, 0, 0, range(6), 4)
    plan = plan_mixing(run.augment, *key, IDS, size)
    partner = torch.arange(24) + plan.offset
    images = step.task.normalize(content.tensors["images"])
    mixed = plan.weight.view(-1, 1, 1, 1) * images + (1 - plan.weight).view(-1, 1, 1, 1) * images[partner]
    cuts = [(slot, box) for slot, box in enumerate(plan.box.tolist()) if any(box)]
    for slot, (top, left, bottom, right) in cuts:
        mixed[slot] = images[slot]
        mixed[slot, :, top:bottom, left:right] = images[partner[slot], :, top:bottom, left:right]
    scales = draw_drop_path(step.state.drop_path, *key, 24).float()  # as the step sends them to the device
    assert 4 < len(cuts) < 20 and (scales[:, 4:] == 0).any(1).all()  # both kinds of mixing, and every branch left out

    filled = torch.from_numpy(IDS >= 0)
    set_drop_path(reference.drop_path, scales[:, filled])
    logits = reference.model.train()(mixed[filled])
    own, partners = (
        F.cross_entropy(logits, labels[filled], label_smoothing=0.1, reduction="none")
        for labels in (content.tensors["labels"], content.tensors["labels"][partner])
    )
    weight = plan.weight[filled]
    loss = (weight * own + (1 - weight) * partners).mean()
    loss.backward()
    for name, parameter in reference.model.named_parameters():
        is_resampled = name == "pos_embed" and size != 8  # in float32, by timm
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-9 if is_resampled else 1e-12)
    assert step.epoch_sums() == (pytest.approx(21 * loss.item(), rel=1e-12), 21)
    assert all((module.count > 0) == (form == "subset") for module in step.state.drop_path)
    one = images[:1]  # as a new DDP takes it, whatever the last step left out
    assert torch.equal(step.state.model.train()(one), step.state.model.eval()(one))


def test_evaluation_counts_every_filled_slot_once(tmp_path):
    step = train_step(settings(tmp_path, micro_batch=8))
    content = batch(IDS)
    (result,) = step.evaluate([content, content])
    filled = torch.from_numpy(IDS >= 0)
    logits = step.state.model.eval()(step.task.normalize(content.tensors["images"]))[filled]
    labels = content.tensors["labels"][filled]
    assert result.images == 42
    assert result.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result.top5 == pytest.approx((ranks < 5).double().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item())


def test_a_step_takes_its_weights_into_the_average_which_is_evaluated_beside_them(tmp_path):
    step = train_step(settings(tmp_path, micro_batch=8, ema=0.75, learning_rate=0.1))
    content, begin = batch(IDS), copy.deepcopy(step.state.model)
    step.train(content)
    average = step.state.ema.tensors()
    for name, tensor in step.state.model.state_dict().items():
        torch.testing.assert_close(average[name], 0.75 * begin.state_dict()[name] + 0.25 * tensor, rtol=0, atol=1e-14)
    own, averaged = step.evaluate([content, content])
    begin.load_state_dict(average)
    filled, labels = torch.from_numpy(IDS >= 0), content.tensors["labels"][torch.from_numpy(IDS >= 0)]
    logits = begin.eval()(step.task.normalize(content.tensors["images"]))[filled]
    assert averaged.images == own.images == 42
    assert averaged.loss == pytest.approx(F.cross_entropy(logits, labels).item()) != pytest.approx(own.loss)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_the_images_that_are_shown_are_those_that_the_model_takes(tmp_path, monkeypatch, mixup):
    step, content = train_step(settings(tmp_path, augment={"mixup": mixup})), batch(IDS)
    plan = plan_mixing(step.state.settings.augment, 0, 0, 0, range(6), 4, IDS, 8)
    own, partner = content.tensors["images"].double(), content.tensors["images"][torch.arange(24) + plan.offset].double()
    by_hand = partner + plan.weight[:, None, None, None] * (own - partner)
    shown = step.shown_images(content)
    assert shown.dtype == np.uint8
    np.testing.assert_allclose(shown, by_hand.numpy(), rtol=0, atol=0.5 + 1e-9)
    assert np.array_equal(shown, content.tensors["images"].numpy()) == (mixup == 0)
    monkeypatch.setattr("prelora_ray.engine.step._SHOWN", 3)  # fewer than a cell has
    assert np.array_equal(step.shown_images(content), shown[:3])


def test_clipping_against_torch(tmp_path):
    step = train_step(settings(tmp_path, clip_norm=0.01))
    norms = []
    step.state.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in step.state.model.parameters()]).norm().item())
    )
    step.train(batch(IDS))
    assert norms == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize("form", ["mask", "subset"])
def test_merged_adapters_train_as_the_plain_ones_do(tmp_path, form):
    """Through both changes of phase, in float64: what is held of the weights is brought up to date at every step."""
    trained, losses = [], []
    for adapters in ("plain", "merged"):
        run = settings(tmp_path, drop_path=0.5, form=form, adapters=adapters, learning_rate=0.01, micro_batch=8)
        step = train_step(run)
        state = step.state
        ranks = {target.name: 2 << i % 3 for i, target in enumerate(state.targets)}
        for phase in Phase:
            state.enter(phase, ranks)
            for _ in range(3):
                step.train(batch(IDS))
        trained.append(dict(state.model.named_parameters()))
        losses.append(step.evaluate([batch(IDS)])[0].loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for name, plain in trained[0].items():
        torch.testing.assert_close(trained[1][name], plain, rtol=0, atol=1e-9)
        assert "lora_" not in name or trained[1][name].abs().max() > 0


@pytest.mark.parametrize(("phase", "scale"), [(Phase.WARMUP, 1), (Phase.LORA, 3)])
def test_a_step_gives_adapters_the_rate_of_its_phase(tmp_path, phase, scale):
    step = train_step(settings(tmp_path, method={"adapter_learning_rate_scale": 3, "adapter_ramp_steps": 0}))
    step.state.enter(phase, {target.name: 2 for target in step.state.targets})
    step.train(batch(IDS))
    rates = {group["name"]: group["lr"] for group in step.state.optimizer.param_groups}
    assert rates["adapter"] == pytest.approx(scale * step.learning_rate) and rates["no_decay"] == step.learning_rate > 0


def test_a_loss_that_is_not_finite_names_its_step_and_phase(tmp_path):
    step = train_step(settings(tmp_path))
    step.train(batch(IDS))
    step.check_finite()
    step.state.batch = 1
    with torch.no_grad():
        step.state.model.head.bias[0] = torch.nan
    step.train(batch(IDS))
    step.train(batch(IDS))
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 1 .*phase full"):
        step.check_finite()


def test_a_gradient_that_overflows_is_not_finite_either(tmp_path):
    step = train_step(settings(tmp_path))
    with torch.no_grad():
        step.state.model.head.weight *= 1e160  # the squares of its gradients are beyond float64
    gradients = gradients_of_a_step(step, batch(IDS))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 0 .*phase full"):
        step.check_finite()
