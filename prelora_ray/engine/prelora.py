"""The method as one object over a model: in this project's runs, and in any other training loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from prelora_ray.config_file import parse_method
from prelora_ray.engine.agreement import agreed
from prelora_ray.engine.fp8 import Fp8Linear
from prelora_ray.engine.optim import adapter_rate_scale
from prelora_ray.engine.precision import check_precision, stand_back, use_products
from prelora_ray.errors import UserError
from prelora_ray.method.adapters import (
    LoraLayer,
    inject,
    is_adapter_parameter,
    merged_state_dict,
    peft_config,
    peft_state_dict,
)
from prelora_ray.method.architecture import find_targets, head_parameters
from prelora_ray.method.phases import Decision, Phase, freeze_parameters
from prelora_ray.method.targets import target_norms
from prelora_ray.schedule import largest_ranks, phase_schedule

_GROUP = "adapter"


class PreLoRA:
    """Takes a model through full training, warmup and lora.

        model = timm.create_model("vit_small_patch16_224")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        prelora = PreLoRA(model, optimizer, tau=0.5, warmup_epochs=10)
        for epoch in range(epochs):
            loss = train_one_epoch(model, optimizer)
            if prelora.end_epoch(loss).begins_phase:
                print(prelora.phase)

    The optimizer keeps its state: the adapters' parameters join a group of their own, which is there from the start on,
    empty, so that a learning-rate scheduler made after this object sets its rate too; what freezes leaves its group.
    Where the model is in a wrapper that knows its parameters, such as DistributedDataParallel, wrap it anew when a
    phase begins.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        ramp_epochs: int = 0,
        seed: int = 0,
        adapters: Literal["plain", "merged"] | None = None,
        precision: Literal["fp32", "bf16", "fp8"] = "fp32",
        **method: Any,
    ) -> None:
        """`model` is one that `prelora models` knows, timm's or transformers', without a wrapper; without `optimizer`
        handing it over is the caller's.

        `ramp_epochs`: of the learning rate, before which the test takes no verdict. `seed`: of the adapters' A.
        `adapters`, `precision`: as `train.adapters` and `train.precision` of a recipe, for a loop that calls the model
        under `torch.autocast` in bf16 and fp8; None leaves each layer in the plain form. `method`: the keys of a
        recipe's section `method`, with its defaults.

        Raises UserError where a key is not allowed, the model has not what the method adapts, or the hardware no fp8.
        """
        if adapters not in (None, "plain", "merged"):
            raise UserError(f"adapters = {adapters!r} is not allowed: it must be 'plain', 'merged' or None")
        if precision not in ("fp32", "bf16", "fp8"):
            raise UserError(f"precision = {precision!r} is not allowed: it must be 'fp32', 'bf16' or 'fp8'")
        if precision != "fp32" and adapters is None:
            raise UserError(f"precision = {precision!r} is not allowed without adapters: give adapters='merged'")
        self.method = parse_method(method)
        self.model = model
        self.optimizer: torch.optim.Optimizer | None = None
        self.epoch = 0
        """Epochs done."""
        self._seed = seed
        self._products = adapters, precision
        try:
            self.targets = find_targets(model, self.method.targets)
        except ValueError as error:
            raise UserError(str(error)) from None
        check_precision(precision, _device_of(model), "precision")
        if self.method.freeze == "all_but_head" and not head_parameters(model):
            raise UserError("method.freeze = 'all_but_head' is not allowed: the model has no head")
        largest_ranks(self.method, self.targets)
        self.schedule = phase_schedule(self.method, ramp_epochs, [target.name for target in self.targets])
        self._adapter_steps = 0
        """Optimizer steps since the switch."""
        self._holding: list[LoraLayer | Fp8Linear] = []
        """Layers that hold what they compute with."""
        self._is_stale = False
        """Whether weights have changed since."""
        if optimizer is not None:
            self.join(optimizer)
        if adapters is not None:
            model.register_forward_pre_hook(lambda *_: self._refresh())
            model.register_load_state_dict_post_hook(lambda *_: self._has_changed())

    @property
    def phase(self) -> Phase:
        """The phase that the next epoch is in."""
        return self.schedule.phase

    @property
    def ranks(self) -> dict[str, int] | None:
        """Rank by module name; None in phase full."""
        return self.schedule.ranks

    def end_epoch(self, loss: float) -> Decision:
        """Takes an epoch's mean training loss, decides, and moves model and optimizer on where a phase begins.

        In data-parallel training every worker calls it after the same step: the mean of their losses counts, and rank
        0's decision holds on all of them.
        """
        if dist.is_available() and dist.is_initialized():
            total = torch.tensor(loss, dtype=torch.float64, device=next(self.model.parameters()).device)
            dist.all_reduce(total)
            loss = total.item() / dist.get_world_size()
        decision = self.schedule.end_epoch(self.epoch, target_norms(self.model, self.targets), loss)
        with torch.cuda.device_of(next(self.model.parameters())):  # NCCL broadcasts on the current one, set or not
            decision = agreed(self.schedule, decision)
        self.epoch += 1
        self.apply(decision)
        return decision

    def apply(self, decision: Decision) -> None:
        """Moves model and optimizer on to the phase that a decision begins."""
        if not decision.begins_phase:
            return
        stand_back(self.model)
        if decision.switch is not None:
            inject(self.model, self.targets, decision.switch, self.method.scaling, self._seed)
        if decision.freeze:
            freeze_parameters(self.model, self.targets, self.method.freeze)
        if self.optimizer is not None:
            self._hand_over(self.optimizer)
        adapters, precision = self._products
        if adapters is not None:
            self._holding = use_products(self.model, precision, adapters)
            self._has_changed()

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs beside the states of model and optimizer, as JSON can hold it."""
        return {"epoch": self.epoch, "adapter_steps": self._adapter_steps, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Gives a model that has no adapters those of `state`. Load the states of model and optimizer after it."""
        if self.phase is not Phase.FULL:
            raise RuntimeError(f"the model is in phase {self.phase} already: load into a new one")
        self.epoch, self._adapter_steps = state["epoch"], state["adapter_steps"]
        self.schedule.load_state_dict(state["schedule"])
        self.apply(Decision(switch=self.ranks, freeze=self.phase is Phase.LORA))

    def merged_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of the timm model that computes what this one does, under timm's names."""
        return merged_state_dict(self.model)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapters into a folder that PEFT loads. Raises RuntimeError in phase full, which has none."""
        if self.phase is Phase.FULL:
            raise RuntimeError("there are no adapters in phase full")
        save_adapter(self.model, folder)

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes on an optimizer of the model's parameters, where none was given, in any phase."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's and Lightning's are wrappers
        group = {
            "params": [],
            "name": _GROUP,
            "lr": optimizer.param_groups[0]["lr"],
            "weight_decay": self.method.adapter_weight_decay,
        }
        optimizer.add_param_group(group)
        optimizer.register_step_pre_hook(lambda *_: self._begin_step(optimizer))
        optimizer.register_step_post_hook(lambda *_: self._end_step(optimizer))
        self.optimizer = optimizer
        if self.phase is not Phase.FULL:
            self._hand_over(optimizer)

    def _hand_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Adapters join their group, and what is frozen leaves its own."""
        adapters = [parameter for name, parameter in self.model.named_parameters() if is_adapter_parameter(name)]
        known = {id(parameter) for parameter in adapters}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if p.requires_grad and id(p) not in known]
        _group_of(optimizer)["params"] = adapters

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        group = _group_of(optimizer)
        self._rate = group["lr"]
        if group["params"]:
            group["lr"] = self._rate * adapter_rate_scale(self.method, self.phase, self._adapter_steps)

    def _end_step(self, optimizer: torch.optim.Optimizer) -> None:
        group = _group_of(optimizer)
        group["lr"] = self._rate
        self._adapter_steps += bool(group["params"])
        self._has_changed()

    def _has_changed(self) -> None:
        self._is_stale = True

    def _refresh(self) -> None:
        if self._is_stale:
            self._is_stale = False
            for layer in self._holding:
                layer.refresh()


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes a model's adapters into a folder that PEFT loads, beside a model `base` that it does not write."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in peft_state_dict(model).items()}
    # Not by `save_file`, whose files are readable to their owner alone.
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    config = {"base_model_name_or_path": "base", **peft_config(model)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _device_of(model: nn.Module) -> torch.device:
    """Where it is going to train: one that is still on the CPU may be moved to the GPU later."""
    device = next(model.parameters()).device
    return torch.device("cuda") if device.type == "cpu" and torch.cuda.is_available() else device


def _group_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The adapters' group of parameters."""
    return next(group for group in optimizer.param_groups if group.get("name") == _GROUP)
