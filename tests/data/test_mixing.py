import numpy as np
import pytest
import torch
from PIL import Image

from prelora_ray.data.augment_settings import AugmentSettings
from prelora_ray.data.mixing import MixPlan, mix, normalize, plan_mixing, soft_targets


def plan(augment: AugmentSettings, cells, ids, size=4, batch=0):
    return plan_mixing(augment, 7, 2, batch, cells, size, ids, image_size=8)


def test_partners_stay_inside_the_cell_and_among_filled_slots():
    ids = np.array([0, 1, 2, 3, 4, 5, -1, -1, 8, -1, -1, -1, -1, -1, -1, -1])
    drawn = plan(AugmentSettings(mixup=1.0), [0, 1, 2], ids)
    partner = torch.arange(16) + drawn.offset
    assert sorted(partner[:4]) == [0, 1, 2, 3]
    assert sorted(partner[4:6]) == [4, 5]
    assert partner[6:].tolist() == list(range(6, 16))  # one image alone, empty slots, padding
    assert (drawn.weight[8:] == 1).all()
    assert len(drawn.weight[:4].unique()) == 1
    assert drawn.weight[0] != drawn.weight[4]


def test_a_cell_is_mixed_alike_wherever_it_is():
    ids = np.arange(16)
    whole = plan(AugmentSettings(mixup=0.8, cutmix=1.0), range(4), ids)
    for cell in range(4):
        alone = plan(AugmentSettings(mixup=0.8, cutmix=1.0), [cell], ids[:4])
        part = slice(4 * cell, 4 * cell + 4)
        assert torch.equal(whole.offset[part], alone.offset)
        assert torch.equal(whole.weight[part], alone.weight)
        assert torch.equal(whole.box[part], alone.box)


def test_both_kinds_come_and_probability_counts():
    plans = [
        plan(AugmentSettings(mixup=0.8, cutmix=1.0, mix_probability=0.5), range(4), np.arange(16), batch=b) for b in range(50)
    ]
    cells = [(p.weight[i * 4], p.box[i * 4]) for p in plans for i in range(4)]
    plain = sum(weight == 1 for weight, _ in cells)
    cut = sum(weight != 1 and box.any() for weight, box in cells)
    assert 70 < plain < 130  # of 200, half
    assert 25 < cut < 75  # a quarter


def test_mixup_and_cutmix_by_hand():
    images = torch.stack([torch.full((3, 4, 4), float(v)) for v in (1, 2, 3, 4)])
    plan = MixPlan(
        offset=torch.tensor([1, -1, 1, -1]),
        weight=torch.tensor([0.75, 0.75, 0.875, 0.875]),
        box=torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 2, 4], [1, 2, 2, 4]]),
    )
    labels = soft_targets(torch.tensor([0, 1, 2, 0]), num_classes=3, label_smoothing=0.0, dtype=torch.float32)
    mixed, targets = mix(images, labels, plan)
    assert mixed[0].unique().tolist() == [1.25]
    assert mixed[1].unique().tolist() == [1.75]
    expected = torch.full((4, 4), 3.0)
    expected[1, 2:] = 4
    assert torch.equal(mixed[2], expected.expand(3, 4, 4))
    assert targets.tolist() == [[0.75, 0.25, 0], [0.25, 0.75, 0], [0.125, 0, 0.875], [0.875, 0, 0.125]]


def test_a_box_of_cutmix_cut_off_at_the_border_weighs_what_is_left_of_it():
    """Where own pixels are 1 and the partner's 0, the share of the label is the mean of the pixels."""
    cut_off = 0
    for batch in range(50):
        drawn = plan(AugmentSettings(cutmix=1.0), [0], np.arange(4), batch=batch)
        top, left, bottom, right = drawn.box[0].tolist()
        cut_off += 0 in (top, left) or 8 in (bottom, right)
        pair = MixPlan(torch.tensor([1, -1]), drawn.weight[:2], drawn.box[:2])
        images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)]).double()
        mixed, targets = mix(images, torch.eye(2).double(), pair)
        assert targets[0].tolist() == pytest.approx([mixed[0].mean().item(), 1 - mixed[0].mean().item()])
    assert cut_off > 10


def test_label_smoothing_by_hand():
    targets = soft_targets(torch.tensor([1, -1]), num_classes=4, label_smoothing=0.2, dtype=torch.float64)
    assert targets[0].tolist() == pytest.approx([0.05, 0.85, 0.05, 0.05])
    assert targets[1].tolist() == pytest.approx([0.85, 0.05, 0.05, 0.05])  # an empty slot


def test_an_unmixed_cell_keeps_its_bits():
    images = torch.randn(4, 3, 8, 8)
    mixed, targets = mix(images, torch.eye(4), plan(AugmentSettings(mixup=0.8, mix_probability=1e-9), [0], np.arange(4)))
    assert torch.equal(mixed, images)
    assert torch.equal(targets, torch.eye(4))


def test_normalize_against_float64():
    images = torch.arange(2 * 3 * 3 * 3, dtype=torch.uint8).reshape(2, 3, 3, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(normalize(images, mean, std).double(), expected.permute(0, 3, 1, 2), rtol=1e-6, atol=1e-6)


def test_one_value_of_the_mean_makes_it_grey_as_pillow_does():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 90, 90, 3), np.uint8))
    grey = torch.from_numpy(np.stack([Image.fromarray(image.numpy()).convert("L") for image in images]))
    assert torch.equal(normalize(images, (0.0,), (1 / 255,)).round(), grey[:, None].float())
    expected = (grey[:, None].double() / 255 - 0.3) / 0.4
    torch.testing.assert_close(normalize(images, (0.3,), (0.4,), torch.float64), expected, rtol=1e-12, atol=1e-12)
