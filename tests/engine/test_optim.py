import math

import pytest
import timm
import torch

from prelora_ray.config_file import parse_settings
from prelora_ray.engine.model import create_model
from prelora_ray.engine.optim import build_optimizer, learning_rate, optimizer_state, rates_left, set_learning_rate
from prelora_ray.method.adapters import inject
from prelora_ray.method.architecture import find_targets
from prelora_ray.method.phases import Phase, freeze_parameters
from prelora_ray.train.no_effect import without_effect
from tests.engine.test_model import TINY


def settings(**train):
    return parse_settings(
        {
            "name": "x",
            "data": {"path": "x"},
            "train": {"epochs": 10, "ramp_epochs": 2, "learning_rate": 0.1, "final_learning_rate_scale": 0.1, **train},
            "method": {"adapter_learning_rate_scale": 3, "adapter_ramp_steps": 4, "adapter_weight_decay": 0.2, "windows": 2},
        }
    )


@pytest.fixture
def model():
    return create_model(TINY, num_classes=10, seed=0)


def train_a_step(model, optimizer):
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_is_decayed(model):
    inject(model, find_targets(model), {"blocks.0.attn.key": 4})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g["name"]: g for g in build_optimizer(model, settings(weight_decay=0.3, betas=[0.8, 0.95])).param_groups}
    assert {group["betas"] for group in groups.values()} == {(0.8, 0.95)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"decay": 0.3, "no_decay": 0, "adapter": 0.2}
    in_group = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert in_group["adapter"] == {"blocks.0.attn.qkv.lora_A.key", "blocks.0.attn.qkv.lora_B.key"}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias", "blocks.1.mlp.fc1.bias"} <= in_group["no_decay"]
    assert {"patch_embed.proj.weight", "head.weight", "blocks.1.mlp.fc1.weight"} <= in_group["decay"]
    assert sum(map(len, in_group.values())) == len(names)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_hand_over_keeps_moments_of_what_goes_on_and_drops_the_frozen(model, kind):
    run = settings(optimizer=kind)
    optimizer = build_optimizer(model, run)
    train_a_step(model, optimizer)
    before = {name: dict(entry) for name, entry in optimizer_state(model, optimizer).items()}
    targets = [target for target in find_targets(model) if target.name == "blocks.0.mlp.fc1"]
    inject(model, targets, {"blocks.0.mlp.fc1": 4})
    warmup = build_optimizer(model, run, before)
    assert set(optimizer_state(model, warmup)) == set(before)
    train_a_step(model, warmup)
    moved = optimizer_state(model, warmup)
    freeze_parameters(model, targets, "adapted")
    lora = build_optimizer(model, run, moved)
    kept = optimizer_state(model, lora)
    assert set(moved) - set(kept) == {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"}
    for name, entry in kept.items():
        assert all(torch.equal(value, moved[name][key]) for key, value in entry.items())
    assert kept["head.weight"]["step"] == 2
    assert kept["blocks.0.mlp.fc1.lora_A.fc1"]["step"] == 1


@pytest.mark.parametrize("way", [{}, {"optimizer": "lamb"}, {"layer_decay": 0.75}])
def test_going_on_from_a_state_is_going_on(model, way):
    """A hand-over to the same parameters gives the bits that an optimizer left alone gives."""
    import copy

    other = copy.deepcopy(model)
    for network, rebuild in ((model, False), (other, True)):
        torch.manual_seed(1)
        optimizer = build_optimizer(network, settings(**way))
        for _ in range(3):
            train_a_step(network, optimizer)
            if rebuild:
                optimizer = build_optimizer(network, settings(**way), optimizer_state(network, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_schedule_by_hand():
    run = settings()  # 10 epochs of 5 steps: a ramp of 10, then 40 of cosine from 0.1 to 0.01
    assert learning_rate(run, 0, 5) == pytest.approx(0.01)
    assert learning_rate(run, 9, 5) == pytest.approx(0.1)
    assert learning_rate(run, 10, 5) == pytest.approx(0.1)
    assert learning_rate(run, 30, 5) == pytest.approx(0.055)
    assert learning_rate(run, 20, 5) == pytest.approx(0.01 + 0.09 * (0.5 + 0.5 * math.cos(math.pi / 4)))
    assert learning_rate(run, 50, 5) == pytest.approx(0.01)


def test_a_rate_that_is_constant_and_then_decays_by_hand():
    # 10 epochs of 5 steps: a ramp of 2, 0.1 until epoch 6, then 1 - sqrt(progress) down to 0.01 over 4.
    run = settings(schedule="constant-then-decay", decay_share=0.4)
    rates = [learning_rate(run, step, 5) for step in (0, 9, 10, 29, 30, 35, 45, 50)]
    fallen = [0.01 + 0.09 * (1 - math.sqrt(progress)) for progress in (0, 0.25, 0.75, 1)]
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.1, *fallen], rel=1e-12)
    # Bent behind epoch 5 to end after 7: epochs 5 to 6 and 6 to 10 pass in 0.4 and 1.6.
    bent = settings(schedule="constant-then-decay", decay_share=0.4, epochs=7, bend={"after": 5, "of": 10})
    assert [learning_rate(bent, step, 5) for step in (24, 27, 31, 35)] == pytest.approx(
        [0.1, 0.1, 0.01 + 0.09 * (1 - math.sqrt(0.5)), 0.01], rel=1e-12
    )


def test_a_bent_schedule_by_hand():
    """From epoch 6 on, the 4 epochs that are left of 10 pass in 2."""
    trunk, run = settings(), settings(epochs=8, bend={"after": 6, "of": 10})
    assert [learning_rate(run, step, 5) for step in range(31)] == [learning_rate(trunk, step, 5) for step in range(31)]
    for step, position in ((31, 32), (35, 40), (39, 48), (40, 50)):
        by_hand = 0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * (position - 10) / 40)) / 2)
        assert learning_rate(run, step, 5) == pytest.approx(by_hand, rel=1e-12)
        assert learning_rate(run, step, 5) == pytest.approx(learning_rate(trunk, position, 5), rel=1e-12)


def test_a_bend_inside_the_ramp_and_one_by_an_odd_share():
    in_ramp = settings(epochs=8, ramp_epochs=4, bend={"after": 2, "of": 10})  # what is left of the ramp passes in 1.5 epochs
    assert learning_rate(in_ramp, 8, 4) == pytest.approx(0.1 * 9 / 16)
    assert learning_rate(in_ramp, 11, 4) == pytest.approx(0.1 * (8 + 3 * 4 / 3 + 1) / 16)
    odd = settings(epochs=9, bend={"after": 2, "of": 10})
    assert learning_rate(odd, 9 * 7, 7) == pytest.approx(0.01, rel=1e-12)
    assert learning_rate(odd, 2 * 7, 7) == 0.1


def test_the_share_of_the_rates_sum_that_is_left_by_hand():
    """The cosine's integral from share t of it on: 1/2 (1 - t) - sin(pi t) / (2 pi), over all and the ramp's."""
    left = rates_left(settings(epochs=100, ramp_epochs=10, final_learning_rate_scale=0.0))
    assert len(left) == 101
    for epoch, share in ((10, 0.0), (40, 1 / 3), (85, 75 / 90)):
        by_hand = 90 * ((1 - share) / 2 - math.sin(math.pi * share) / (2 * math.pi)) / (5 + 45)
        assert left[epoch] == pytest.approx(by_hand, abs=1e-3)
    assert (left[0], left[100]) == (1.0, 0.0)
    bent = rates_left(settings(epochs=70, ramp_epochs=10, final_learning_rate_scale=0.0, bend={"after": 40, "of": 100}))
    assert bent[40] == pytest.approx(left[40] / 2 / (1 - left[40] / 2), abs=1e-3)  # at twice the pace half of it is spent
    # A ramp's half of 10, 70 at the peak, and a third of the last 20, over which 1 - sqrt falls.
    decays = rates_left(settings(epochs=100, ramp_epochs=10, schedule="constant-then-decay", final_learning_rate_scale=0.0))
    assert [decays[epoch] for epoch in (10, 45, 80)] == pytest.approx(
        [(70 + 20 / 3) / (75 + 20 / 3), (35 + 20 / 3) / (75 + 20 / 3), 20 / 3 / (75 + 20 / 3)], abs=2e-3
    )


@pytest.mark.parametrize(("phase", "scale"), [(Phase.WARMUP, 1), (Phase.LORA, 3)])
def test_adapters_rise_after_the_switch_and_have_a_rate_of_their_own_in_lora(model, phase, scale):
    inject(model, find_targets(model), {"blocks.0.attn.key": 4})
    optimizer = build_optimizer(model, settings())
    rates = []
    for step in (20, 21, 23, 24):
        rate = set_learning_rate(optimizer, settings(), step, 5, phase, switch_step=20)
        by_name = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert by_name["decay"] == by_name["no_decay"] == rate
        rates.append(by_name["adapter"] / rate)
    assert rates == pytest.approx([scale / 4, scale / 2, scale, scale])


def test_rates_fall_by_layer_as_timm_has_it(model):
    """By hand, and against timm's groups; an adapter has its block's."""
    inject(model, find_targets(model), {"blocks.0.attn.key": 4, "blocks.2.mlp.fc1": 4})
    run = settings(layer_decay=0.5)
    optimizer = build_optimizer(model, run)
    rate = set_learning_rate(optimizer, run, step=30, batches=5, phase=Phase.LORA, switch_step=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr"] / rate for group in optimizer.param_groups for p in group["params"]}
    by_hand = {"cls_token": 1 / 16, "pos_embed": 1 / 16, "patch_embed.proj.weight": 1 / 16}
    by_hand |= {f"blocks.{i}.mlp.fc2.weight": 0.5 ** (3 - i) for i in range(3)}
    by_hand |= {"norm.weight": 0.5, "head.weight": 1.0, "head.bias": 1.0}
    by_hand |= {"blocks.0.attn.qkv.lora_A.key": 3 / 8, "blocks.2.mlp.fc1.lora_B.fc1": 3 / 2}  # 3 is the adapters' own
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-12)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    of_timm = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert found.keys() == of_timm.keys()
    for name, scale in of_timm.items():
        assert found[name] == pytest.approx(scale * (3 if ".lora_" in name else 1)), name
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    whole = build_optimizer(model, settings())
    assert decays == {names[id(p)]: group["weight_decay"] for group in whole.param_groups for p in group["params"]}


@torch.no_grad()
def test_a_step_of_lamb_by_hand():
    """A matrix's Adam step with its decay is as long as the learning rate times the matrix; a bias takes Adam's."""
    model = create_model(TINY, num_classes=10, seed=0).double()
    run = settings(optimizer="lamb", weight_decay=0.3, betas=[0.8, 0.95])
    optimizer = build_optimizer(model, run)
    gradients = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = 5 * gradients[name]  # longer than 1, at which LAMB would clip
    weight, bias = model.blocks[1].mlp.fc1.weight.clone(), model.blocks[1].mlp.fc1.bias.clone()
    optimizer.step()
    step = {name: gradient / (gradient.abs() + 1e-6 / 5) for name, gradient in gradients.items()}  # m / (sqrt(v) + eps)
    update = step["blocks.1.mlp.fc1.weight"] + 0.3 * weight
    torch.testing.assert_close(model.blocks[1].mlp.fc1.weight, weight - 0.1 * weight.norm() / update.norm() * update)
    torch.testing.assert_close(model.blocks[1].mlp.fc1.bias, bias - 0.1 * step["blocks.1.mlp.fc1.bias"])


def test_lamb_says_that_it_takes_no_cuda_graph():
    assert without_effect(settings(optimizer="lamb", cuda_graph=True)) == [
        "train.cuda_graph has no effect, as train.optimizer is lamb"
    ]
    assert without_effect(settings(optimizer="lamb")) == []
