"""PreLoRA in a plain loop, against PEFT, timm, a resumed loop and the project's own schedule."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from prelora_ray import PreLoRA
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase
from tests.runs import TINY_VIT

STEPS = 3
LATE = {
    "switch_epoch": 1,
    "warmup_epochs": 1,
    "rank_pattern": {"query|fc1": 4, "key|value|proj|fc2": 2},
    "adapter_ramp_steps": 4,
}


class Loop:
    """A training loop of one's own: AdamW, half a cosine, images drawn by step."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=8, **TINY_VIT)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.prelora = PreLoRA(self.model, self.optimizer, **LATE | options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 6)

    def train_epoch(self) -> Phase:
        """Returns the phase that the next one is in."""
        losses = []
        for step in range(STEPS):
            images, labels = batch(self.prelora.epoch * STEPS + step)
            loss = F.cross_entropy(self.model.train()(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        logits_of(self.model)  # as a validation would
        self.scheduler.step()
        self.prelora.end_epoch(sum(losses) / STEPS)
        return self.prelora.phase

    def state(self) -> dict[str, Any]:
        parts = ("prelora", "model", "optimizer", "scheduler")
        return copy.deepcopy({part: getattr(self, part).state_dict() for part in parts})

    def load(self, state: dict[str, Any]) -> None:
        for part, content in state.items():
            getattr(self, part).load_state_dict(content)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch(99)[0])


def test_phases_change_no_output_and_freeze_what_has_adapters():
    loop = Loop()
    before = {name: parameter.clone() for name, parameter in loop.model.named_parameters()}
    assert [loop.train_epoch() for _ in range(3)] == [Phase.WARMUP, Phase.LORA, Phase.LORA]
    frozen = {name for name, parameter in loop.model.named_parameters() if not parameter.requires_grad}
    adapted = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = [f"{name}.{kind}" for name in adapted for kind in ("weight", "bias")]
    assert frozen == {f"blocks.{i}.{name}" for i in range(TINY_VIT["depth"]) for name in names}
    assert not any(torch.equal(parameter, before[name]) for name, parameter in loop.model.named_parameters() if name in before)
    held = copy.deepcopy({name: loop.model.get_parameter(name) for name in frozen})
    loop.train_epoch()
    assert all(torch.equal(loop.model.get_parameter(name), tensor) for name, tensor in held.items())
    known = {id(parameter) for group in loop.optimizer.param_groups for parameter in group["params"]}
    trains = {id(parameter) for parameter in loop.model.parameters() if parameter.requires_grad}
    assert known == trains == {id(parameter) for parameter in loop.optimizer.state}


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.LORA])
def test_a_change_of_phase_changes_no_logit(phase):
    loop, apply = Loop(), PreLoRA.apply
    seen = []

    def watched(prelora: PreLoRA, decision: Any) -> None:
        before = logits_of(loop.model)
        apply(prelora, decision)
        seen.append((prelora.phase, decision.begins_phase, (logits_of(loop.model) - before).abs().max().item()))

    loop.prelora.apply = watched.__get__(loop.prelora)  # type: ignore[method-assign]
    while loop.train_epoch() is not phase:
        pass
    assert seen[-1][:2] == (phase, True) and seen[-1][2] <= 1e-5


def test_moments_go_on_and_the_adapters_rate_rises_and_is_their_own_in_lora():
    loop = Loop(adapter_learning_rate_scale=2.0)
    loop.train_epoch()
    norm = loop.model.norm.weight
    assert loop.optimizer.state[norm]["step"] == STEPS
    rates = []
    group = loop.optimizer.param_groups[-1]
    loop.optimizer.register_step_pre_hook(lambda *_: rates.append(group["lr"]))
    loop.train_epoch()
    loop.train_epoch()
    assert loop.optimizer.state[norm]["step"] == 3 * STEPS
    a = dict(loop.model.named_parameters())["blocks.0.attn.qkv.lora_A.query"]
    assert loop.optimizer.state[a]["step"] == 2 * STEPS
    cosine = [1e-2 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 6)).item()) / 2 for epoch in (1, 2)]
    risen = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    assert loop.prelora.phase is Phase.LORA
    expected = [(1, 2)[i // STEPS] * cosine[i // STEPS] * risen[i] for i in range(2 * STEPS)]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert group["lr"] == pytest.approx(loop.optimizer.param_groups[0]["lr"])  # which a scheduler sets


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("done", [1, 2, 3], ids=["in warmup", "in lora", "later in lora"])
def test_a_loop_that_goes_on_from_its_state_has_the_same_bits(optimizer, done):
    undisturbed, first, second = Loop(optimizer), Loop(optimizer), Loop(optimizer)
    for _ in range(4):
        undisturbed.train_epoch()
    for _ in range(done):
        first.train_epoch()
    second.load(first.state())
    for _ in range(4 - done):
        second.train_epoch()
    expected = undisturbed.model.state_dict()
    assert expected.keys() == second.model.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())


@pytest.mark.parametrize("epochs", [2, 3], ids=["warmup", "lora"])
def test_merged_products_train_as_the_plain_form_does(epochs):
    plain, merged = Loop(), Loop(adapters="merged")
    for _ in range(epochs):
        plain.train_epoch()
        merged.train_epoch()
    expected, saved = logits_of(plain.model), merged.state()["model"]
    torch.testing.assert_close(logits_of(merged.model), expected, rtol=1e-3, atol=1e-4)
    merged.train_epoch()
    if epochs == 3:
        merged.model.load_state_dict(saved)
        torch.testing.assert_close(logits_of(merged.model), expected, rtol=1e-3, atol=1e-4)


def test_timm_and_peft_load_what_comes_out(tmp_path):
    loop = Loop()
    with pytest.raises(RuntimeError, match="no adapters in phase full"):
        loop.prelora.save_adapter(tmp_path)
    for _ in range(3):
        loop.train_epoch()
    merged = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=8, **TINY_VIT)
    merged.load_state_dict(loop.prelora.merged_state_dict())
    torch.testing.assert_close(logits_of(merged), logits_of(loop.model), rtol=1e-4, atol=1e-5)
    loop.prelora.save_adapter(tmp_path)
    base = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=8, **TINY_VIT)
    base.load_state_dict({name: t for name, t in loop.model.state_dict().items() if ".lora_" not in name})
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits_of(adapted), logits_of(loop.model), rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "adapter_model.safetensors")
    config, tensors = (tmp_path / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert tensors.stat().st_mode == config.stat().st_mode  # whoever may list them may read both


def test_the_test_decides_by_norms_and_loss():
    """By hand: two windows of one epoch are compared, so that the first verdict is after the second epoch."""
    options = {"switch_epoch": None, "windows": 2, "window_epochs": 1, "r_min": 2, "r_max": 4, "rank_pattern": None}
    eager, strict = Loop(tau=1e9, zeta=1e9, **options), Loop(tau=0.0, zeta=1e9, **options)
    late = Loop(tau=1e9, zeta=1e9, ramp_epochs=2, **options)
    phases = [[loop.train_epoch() for _ in range(3)] for loop in (eager, strict, late)]
    assert [each.index(Phase.WARMUP) if Phase.WARMUP in each else None for each in phases] == [1, None, 2]
    ranks = eager.prelora.ranks
    assert ranks and set(ranks.values()) == {2, 4} and len(ranks) == 6 * TINY_VIT["depth"]


def test_fp8_is_refused_before_anything_trains(monkeypatch):
    """Also on a machine with a GPU that lacks it, for a model that is yet to be moved there."""
    with pytest.raises(UserError, match=r"^precision = 'fp8' is not allowed on a CPU: it needs an NVIDIA GPU"):
        Loop(precision="fp8", adapters="merged")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(UserError, match="is not allowed on NVIDIA A100: it needs"):
        Loop(precision="fp8", adapters="merged")


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match=r"method\.tau = -1 is not allowed: it must be greater than or equal to 0"):
        Loop(tau=-1)
    with pytest.raises(UserError, match=r"method\.taus = 1 is not allowed: there is no such key, did you mean method\.tau"):
        Loop(taus=1)
    for wrong, told in (
        ({"precision": "fp16", "adapters": "merged"}, "precision = 'fp16' is not allowed: it must be"),
        ({"adapters": "merge"}, "adapters = 'merge' is not allowed: it must be"),
        ({"precision": "bf16"}, "precision = 'bf16' is not allowed without adapters"),
    ):
        with pytest.raises(UserError, match=told):
            Loop(**wrong)
    with pytest.raises(UserError, match="Linear has no blocks that PreLoRA knows"):
        PreLoRA(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"method\.rank_pattern: .* exactly one must match"):
        Loop(rank_pattern={"query": 2, ".*": 4})
    loop = Loop()
    while loop.train_epoch() is not Phase.LORA:
        pass
    with pytest.raises(RuntimeError, match="in phase lora already"):
        loop.prelora.load_state_dict(loop.prelora.state_dict())


def test_it_needs_no_ray():
    code = "import sys; from prelora_ray import PreLoRA; print('ray' in sys.modules)"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "False\n"
