"""What a run is at a moment: model, phase, optimizer, position. What a checkpoint holds, and how phases change it."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from prelora_ray.config import Settings
from prelora_ray.engine.batch_norm import CellStatistics, cell_norms
from prelora_ray.engine.drop_path import drop_path_modules, use_form
from prelora_ray.engine.ema import Ema
from prelora_ray.engine.exchange import Exchange, align_gradients
from prelora_ray.engine.model import compile_blocks, create_model, example_inputs
from prelora_ray.engine.optim import OptimizerState, build_optimizer, optimizer_state
from prelora_ray.engine.precision import Format, autocast, keep_residual_in_bf16, phase_format, stand_back, use_products
from prelora_ray.engine.prelora import PreLoRA
from prelora_ray.engine.pretrained import load_pretrained
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.method.adapters import (
    base_state_dict,
    inject,
    load_peft_state_dict,
    merged_state_dict,
    peft_config,
    peft_state_dict,
)
from prelora_ray.method.architecture import find_targets
from prelora_ray.method.phases import Decision, Phase, count_parameters

SWITCH_TOLERANCE = 1e-5
"""Largest change of a logit that injecting adapters may make, in float32."""
_STEP_BYTES = 4
"""Of the optimizer's count of steps, a float32 for each parameter."""


class TrainState:
    """Model, phases, optimizer and position of a run, the same on every worker.

    `network` is what a step calls: the model in DDP, or the model itself with one worker. It is built
    anew at each change of phase, for what trains.
    """

    def __init__(
        self,
        settings: Settings,
        num_classes: int,
        batches: int,
        device: torch.device,
        world_size: int,
        checkpoint: Snapshot | None = None,
        exchange: Exchange | None = None,
        initial: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """The state of a checkpoint, or of a run that begins. `batches` is the number of global batches in an epoch.

        `initial`: what `model.init_from` names, for a run that begins; None draws the weights.
        `exchange`: how workers exchange their gradients, where it is not to be as the settings say.
        """
        self.settings = settings
        self.batches = batches
        self.device = device
        self.world_size = world_size
        self.exchange = exchange or Exchange.of(settings.train.gradient_exchange)
        dtype = torch.float64 if settings.train.precision == "fp64" else torch.float32
        self.model = create_model(settings.model, num_classes, settings.train.seed, any_size=self._any_size).to(device, dtype)
        self.pretrained_notes: list[str] = []
        """What `load_pretrained` tells."""
        if initial is not None:
            self.pretrained_notes = load_pretrained(self.model, initial, str(settings.model.init_from))
        if settings.train.residual == "bf16":
            keep_residual_in_bf16(self.model)
        if world_size > 1:
            align_gradients(self.model)
        use_form(self.model, settings.model.drop_path_form, settings.data.cell)
        self.drop_path = drop_path_modules(self.model)
        self.batch_norm = CellStatistics(self.model) if cell_norms(self.model) else None
        method, ramp_epochs = settings.method.model_dump(), settings.train.ramp_epochs
        self.prelora = PreLoRA(self.model, ramp_epochs=ramp_epochs, seed=settings.train.seed, **method)
        self.targets = self.prelora.targets
        self.phases = self.prelora.schedule
        self.epoch = 0
        """Epochs done."""
        self.batch = 0
        """Global batches done in the epoch after."""
        self.fork: Decision | None = None
        """The change of phase that the checkpoint of a trunk has yet to go through, where a fork begins with one."""
        self.logit_change: float | None = None
        """Largest change of a logit at the last change of phase, by another number format and other products."""
        self.ema: Ema | None = None
        """The moving average of the weights."""
        self.network: nn.Module = self.model
        if checkpoint is not None:
            self._load(checkpoint)
        phase = self.phases.phase
        if self.fork is not None:
            self.phases.phase = Phase.FULL  # its trunk's, whose format the change is measured against
        self._rebuild(checkpoint.optimizer if checkpoint is not None else {})
        if self.fork is not None:
            self.phases.phase = phase
            self.apply(self.fork)
        if settings.train.ema is not None:
            self.ema = self._build_ema(settings.train.ema, num_classes, checkpoint)
            self.ema.follow(self.model)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.batches + self.batch

    @property
    def switch_step(self) -> int | None:
        """Optimizer steps done at the switch."""
        return None if self.phases.switched_at is None else self.phases.switched_at * self.batches

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def gradient_bytes(self) -> int:
        """What every worker exchanges in a step; 0 with one worker."""
        if self.world_size == 1:
            return 0
        dtype = self.exchange.number_format or self.dtype
        return dtype.itemsize * count_parameters(self.model)[0]

    @property
    def format(self) -> Format:
        """Number format of the products in the phase that the run is in."""
        train = self.settings.train
        return phase_format(train.precision, train.fp8_from, self.phases.phase, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """What the network is called in."""
        return autocast(self.format, self.device)

    @property
    def uses_cuda_graph(self) -> bool:
        """One GPU alone, as several would have to capture their exchange of gradients too; and AdamW alone, as LAMB
        counts its steps on the CPU."""
        train = self.settings.train
        return self.device.type == "cuda" and self.world_size == 1 and train.cuda_graph and train.optimizer == "adamw"

    @property
    def image_size(self) -> int:
        """Side of the images of the epoch that trains, in pixels."""
        return self.settings.image_size(self.epoch)

    @property
    def _any_size(self) -> bool:
        return bool(self.settings.train.resolution)

    @property
    def compiles(self) -> bool:
        """Whether the first step of a phase compiles."""
        compiles = self.settings.train.compile
        return self.device.type == "cuda" if compiles == "auto" else compiles

    def enter(self, phase: Phase, ranks: dict[str, int] | None = None) -> None:
        """Goes on in a later phase now, whatever the test says; from full on with these ranks by module name."""
        self.apply(self.phases.enter(phase, ranks, self.epoch))

    def apply(self, decision: Decision) -> None:
        """Moves model, optimizer and network on to the phase that a decision begins."""
        if not decision.begins_phase:
            return
        moments = optimizer_state(self.model, self.optimizer)
        before = self._probe(self._format_built)
        stand_back(self.model)  # adapters go into the model's own modules, which alone compute exactly
        exact = self._probe("fp32") if decision.switch is not None else None
        self.prelora.apply(decision)
        if exact is not None:
            change = (self._probe("fp32") - exact).abs().max().item()
            if not change <= SWITCH_TOLERANCE:
                raise RuntimeError(f"injecting the adapters changed a logit by {change}, and must not change any")
        self._rebuild(moments)
        self.logit_change = (self._probe(self.format) - before).abs().max().item()

    def refresh(self) -> None:
        """Brings up to date what products hold of weights that a step changes. Call before each step and evaluation."""
        for layer in self._holding:
            layer.refresh()

    def snapshot(self, sums: list[list[float]], *, holds_base: bool, score: float | None = None) -> Snapshot:
        """What rank 0 saves: copies on the device, which training does not change any more.

        `sums`: the epoch's sums so far of every worker, empty at an epoch's end. `holds_base`: whether the run
        folder has the frozen tensors already.
        """
        model, base, adapter = self._saved_tensors()
        switched = self.phases.phase is not Phase.FULL
        moments = optimizer_state(self.model, self.optimizer)
        return Snapshot(
            state={
                "epoch": self.epoch,
                "batch": self.batch,
                "phases": self.phases.state_dict(),
                "sums": sums,
                "fork": False,
            },
            model=_copied(model),
            optimizer={name: _copied(entry) for name, entry in moments.items()},
            base={} if holds_base else _copied(base),
            refers_to_base=self.phases.phase is Phase.LORA,
            adapter=_copied(adapter),
            adapter_config=peft_config(self.model) if switched else None,
            ema=_copied(self.ema.tensors()) if self.ema is not None else {},
            score=score,
        )

    def snapshot_bytes(self) -> int:
        """Bytes of this phase's largest snapshot on the device: with the frozen base, all moments and averages."""
        saved = sum(tensor.nbytes for part in self._saved_tensors() for tensor in part.values())
        return saved + self.moment_bytes() + (self.ema.num_bytes() if self.ema is not None else 0)

    def moment_bytes(self) -> int:
        """What the optimizer's state takes on the device: two moments of all that trains, and a count of steps each."""
        return sum(2 * parameter.nbytes + _STEP_BYTES for parameter in self.model.parameters() if parameter.requires_grad)

    def _saved_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The model's own tensors that train or are no parameters, those that phase lora has frozen, and adapters'."""
        model = base_state_dict(self.model)
        frozen: set[str] = set()
        if self.phases.phase is Phase.LORA:
            frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        base = {name: tensor for name, tensor in model.items() if name in frozen}
        own = {name: tensor for name, tensor in model.items() if name not in frozen}
        return own, base, {} if self.phases.phase is Phase.FULL else peft_state_dict(self.model)

    def _load(self, checkpoint: Snapshot) -> None:
        """Position, phase and weights of a checkpoint."""
        self.epoch, self.batch = checkpoint.state["epoch"], checkpoint.state["batch"]
        self.phases.load_state_dict(checkpoint.state["phases"])
        _load_weights(self.model, self.settings, checkpoint)
        is_frozen = self.phases.phase is Phase.LORA
        # A checkpoint that does not say so is a fork where it has ranks and no adapter yet.
        if checkpoint.state.get("fork", self.phases.ranks is not None and not checkpoint.adapter):
            self.fork = Decision(switch=self.phases.ranks, freeze=is_frozen)
        elif is_frozen:
            self.prelora.apply(Decision(freeze=True))

    def _build_ema(self, decay: float, num_classes: int, checkpoint: Snapshot | None) -> Ema:
        """Goes on from a checkpoint, or begins with the weights as they are, which DDP has made every worker's."""
        average = create_model(self.settings.model, num_classes, seed=0).to(self.device, self.dtype)
        average.load_state_dict(merged_state_dict(self.model) if checkpoint is None else checkpoint.ema)
        if self.settings.train.residual == "bf16":
            keep_residual_in_bf16(average)
        return Ema(average, decay)

    def _rebuild(self, moments: OptimizerState) -> None:
        self.optimizer = build_optimizer(self.model, self.settings, moments, capturable=self.uses_cuda_graph)
        self._build_network()
        if self.ema is not None:
            self.ema.follow(self.model)

    def _build_network(self) -> None:
        """Wraps the model in DDP for what trains now.

        DDP orders its buckets anew after its first backward, which changes the order of sums from
        then on. One step with zero weights puts that behind every run, resumed or not, so that both
        sum alike ever after.
        """
        self.network = self.model
        for parameter in self.model.parameters():
            parameter.grad = None
        gc.collect()  # an old DDP keeps its hooks on the parameters until it is gone
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # once a phase: the replays of a CUDA graph allocate nothing
        if self.batch_norm is not None:
            self.batch_norm.freeze(self.phases.phase is Phase.LORA and self.settings.model.batch_norm_in_lora == "frozen")
        self._format_built = self.format
        self._holding = use_products(self.model, self.format, self.settings.train.adapters)
        if self.compiles:
            compile_blocks(self.model, any_size=self._any_size)
        if self.world_size == 1:
            return
        self.network = self.exchange.wrap(self.model, self.device)
        example = example_inputs(self.settings.model, self.model, 1, self.dtype).to(self.device)
        self.network.train()
        with torch.compiler.set_stance("force_eager"), self.autocast():  # or one sample would be compiled by itself
            logits = self.network(example)
        (logits.sum() * 0).backward()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _probe(self, format_: Format) -> torch.Tensor:
        """Logits of two fixed samples in a number format, computed without compiling anything for them."""
        drawn = torch.Generator().manual_seed(0)
        examples = example_inputs(self.settings.model, self.model, 2, self.dtype, drawn).to(self.device)
        self.model.eval()
        self.refresh()
        with torch.compiler.set_stance("force_eager"), autocast(format_, self.device):
            logits: torch.Tensor = self.model(examples)
        return logits.to(self.dtype)


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def restore_model(settings: Settings, num_classes: int, checkpoint: Snapshot, *, ema: bool = False) -> nn.Module:
    """A checkpoint's model with its adapters, on the CPU, for whoever does not train it; or its averaged weights'."""
    model = create_model(settings.model, num_classes, settings.train.seed)
    if ema:
        model.load_state_dict(checkpoint.ema)
    else:
        _load_weights(model, settings, checkpoint)
    return model


def _load_weights(model: nn.Module, settings: Settings, checkpoint: Snapshot) -> None:
    model.load_state_dict(checkpoint.base | checkpoint.model)
    if checkpoint.adapter:
        ranks = checkpoint.state["phases"]["ranks"]
        targets = find_targets(model, settings.method.targets)
        inject(model, targets, ranks, settings.method.scaling, settings.train.seed)
        load_peft_state_dict(model, checkpoint.adapter)
