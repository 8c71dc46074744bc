"""`prelora plan`: a recipe's run on so many GPUs of a kind, by phase and by switch epoch, beside full training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prelora_ray.engine.check import drop_path_form
from prelora_ray.engine.micro_batch import micro_batch_sizes
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase
from prelora_ray.plan.cost import (
    BACKWARD_SHARE,
    Memory,
    Step,
    Workload,
    break_even,
    phase_spans,
    ring_seconds_per_byte,
    sum_by_phase,
    waiting_seconds,
)
from prelora_ray.plan.measured import Estimator, Expected, read_benches
from prelora_ray.plan.result import PhasePlan, Plan, RunPlan
from prelora_ray.plan.sizes import parameters_by_phase
from prelora_ray.plan.source import Source, read_source, workload
from prelora_ray.words import counted

_TIMM = "timm eager full"
"""A benchmark's row: full training as others have it."""
_SHARES = (0.25, 0.5, 0.75)
"""Of the epochs, after which a recipe is switched besides where it switches itself."""
_EXCHANGED_BYTES = {"fp32": 4, "bf16": 2}
"""Of each number of a gradient, by `train.gradient_exchange`."""


@dataclass(frozen=True)
class Options:
    gpus: int | None = None
    """None takes the recipe's `workers.max`, or what a run had last."""
    gpu: str | None = None
    """Part of the GPU's name; None takes what `benches` are of, or H100 of those that come with the project."""
    benches: tuple[str, ...] = ()
    """Files of `prelora bench phases`; empty takes those that come with the project."""
    bandwidth: float | None = None
    """Of the slowest link that all gradients pass, in Gbit/s; None counts their exchange as hidden."""
    memory: float | None = None
    """Of a GPU, in GiB; None takes what the files tell."""
    assume_speed: float | None = None
    """How many times as fast as the measured GPU the planned one is."""
    images: int | None = None
    """Training images; None takes the prepared folder's or the run's, or ImageNet-1k's where neither is there."""


def plan_recipe(path: str, overrides: Sequence[str], options: Options) -> Plan:
    """Plans a recipe; or that of a run folder, whose records tell switch and ranks, and a speed to compare with.

    Raises UserError where the options do not fit the recipe, or where nothing like one of its phases was measured.
    """
    for name in ("bandwidth", "memory", "assume_speed"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value:g} is not allowed: it must be a number above 0")
    return _Planner(read_source(path, overrides, options.images), options).plan()


class _Planner:
    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.settings, self.options = source, source.settings, options
        data, method = self.settings.data, self.settings.method
        self.gpus = options.gpus or source.gpus
        if self.gpus > data.num_cells:
            raise UserError(
                f"--gpus {self.gpus} is not allowed: a batch of {data.batch_size} has "
                f"{counted(data.num_cells, 'cell')} of {data.cell}, and a GPU needs at least one"
            )
        self.share = -(-data.num_cells // self.gpus) * data.cell
        """Images in a step of the GPU that has most."""
        self.steps = -(-source.images // data.batch_size)
        """In an epoch."""
        self.exchanged_bytes = _EXCHANGED_BYTES[self.settings.train.gradient_exchange]
        bench = read_benches(options.benches, options.gpu)
        self.gpu, self.memory_gib = bench.device, options.memory or bench.memory_gib
        if options.assume_speed is not None:
            self.gpu = f"a GPU {options.assume_speed:g} times as fast as {bench.device}"
            self.memory_gib = options.memory
        self.estimator = Estimator(bench, self.settings.model, self.settings.train.residual, source.num_classes)
        self.parameters = parameters_by_phase(self.settings.model, method, source.num_classes, source.ranks)
        phases = tuple(Phase) if method.enabled else (Phase.FULL,)
        epochs = range(self.settings.train.epochs)
        self.kinds = {phase: [workload(self.settings, epoch, phase) for epoch in epochs] for phase in phases}
        """What each epoch would compute in each phase."""
        self.subsets, self.without_subsets = self._find_subsets()
        self.plans = {kind: self._phase(kind) for kinds in self.kinds.values() for kind in dict.fromkeys(kinds)}
        self.costs = {phase: [self.plans[kind].epoch_gpu_hours for kind in kinds] for phase, kinds in self.kinds.items()}

    def plan(self) -> Plan:
        settings, epochs = self.settings, self.settings.train.epochs
        switches = range(1, epochs) if settings.method.enabled else range(0)
        wanted = {round(share * epochs) for share in _SHARES} | {self.source.switch_epoch}
        told = [None, *(switch for switch in switches if switch in wanted)]
        full = sum(self._gpu_hours(None).values())
        by_switch = [sum(self._gpu_hours(switch).values()) for switch in switches]
        timm = self._timm_gpu_hours()
        runs = [self._run(self._name(switch), switch, self._gpu_hours(switch), full, timm) for switch in told]
        if timm is not None:
            runs.append(self._run("timm eager, full", None, {Phase.FULL: timm}, full, timm))
        spans = [self._spans(switch) for switch in told]
        kinds = dict.fromkeys(self.kinds[phase][epoch] for each in spans for phase, span in each.items() for epoch in span)
        return Plan(
            name=settings.name,
            model=settings.model.name,
            epochs=epochs,
            images=self.source.images,
            batch_size=settings.data.batch_size,
            gpus=self.gpus,
            gpu=self.gpu,
            memory_gib=self.memory_gib,
            bandwidth_gbit=self.options.bandwidth,
            phases=[self.plans[kind] for kind in kinds],
            runs=runs,
            break_even_epoch=break_even(by_switch, full),
            gpu_hours_by_switch=by_switch,
            notes=self._notes(),
        )

    def _phase(self, kind: Workload) -> PhasePlan:
        plain = "plain " if self._is_plain(kind) else ""
        name = f"prelora {kind.format} {plain}{kind.phase}"
        expected = self.subsets.get(kind) or self.estimator.expect(name, kind.image_size)
        if expected is None:
            raise UserError(
                f"phase {kind.phase} in {kind.format} was not measured on {self.gpu}: give --bench FILE with a row `{name}` of "
                "`prelora bench phases`"
            )
        trainable, parameters = self.parameters[kind.phase]
        per_image = expected.bytes_per_image
        averaged = self.parameters[Phase.FULL][1] if self.settings.train.ema is not None else 0
        memory = None if per_image is None else Memory(trainable, parameters, per_image, averaged)
        largest = self._largest_micro_batch(memory, kind.phase)
        setting = self.settings.train.micro_batch
        wanted = largest if setting == "auto" else setting
        micro_batch = min(wanted or self.share, self.share)  # the whole share where neither says less
        step = self._step(expected, micro_batch, trainable, self.exchanged_bytes)
        return PhasePlan(
            phase=kind.phase,
            image_size=kind.image_size,
            format=kind.format,
            images_per_second=self.source.images / (self.gpus * self.steps * step.seconds),
            measured_images_per_second=self.source.measured.get(kind),
            step_ms=1e3 * step.seconds,
            waiting_ms=1e3 * step.waiting_seconds,
            exchanged_bytes=self.exchanged_bytes * trainable if self.gpus > 1 else 0,
            trainable_parameters=trainable,
            parameters=parameters,
            micro_batch=micro_batch,
            memory_gib=None if memory is None else memory.peak(micro_batch) / 2**30,
            largest_micro_batch=largest,
            least_gib=None if memory is None else memory.needs(self.settings.data.cell) / 2**30,
            fits=None if largest is None else micro_batch <= largest,
            epoch_gpu_hours=self._epoch_gpu_hours(step),
            measured_batch=expected.batch,
            is_estimated=expected.is_estimated,
            source=expected.source,
        )

    def _find_subsets(self) -> tuple[dict[Workload, Expected], list[str]]:
        """What each kind of step does with drop path as subsets, and the steps that no file has so.

        Where there is one of these no step counts them: phases of which some do would not compare.
        """
        model = self.settings.model
        if drop_path_form(model, self.settings.data.cell)[0] == "mask":
            return {}, []
        found: dict[Workload, Expected] = {}
        missing: dict[str, None] = {}
        for kind in (kind for kinds in self.kinds.values() for kind in kinds):
            row = f"prelora {kind.format} {model.drop_path_rule} subset {model.drop_path:g} {kind.phase}"
            expected = self.estimator.expect(row, kind.image_size)
            if expected is None:
                missing[f"{kind.phase} in {kind.format}"] = None
            else:
                found[kind] = expected
        return ({} if missing else found), list(missing)

    def _is_plain(self, kind: Workload) -> bool:
        return self.settings.train.adapters == "plain" and kind.phase is not Phase.FULL and kind.format != "fp8"

    def _largest_micro_batch(self, memory: Memory | None, phase: Phase) -> int | None:
        """That fits, of those that a run tries; None where it cannot be told. Raises UserError where none fits."""
        if memory is None or self.memory_gib is None:
            return None
        cell = self.settings.data.cell
        for size in micro_batch_sizes(self.share, cell):
            if memory.needs(size) <= self.memory_gib * 2**30:
                return size
        raise UserError(
            f"{self.settings.model.name} does not fit on a GPU of {self.memory_gib:.0f} GiB: with {counted(cell, 'image')} at "
            f"once (data.cell) phase {phase} needs one of {_gib(memory.needs(cell))}, {_gib(memory.state)} of it for the "
            f"weights, gradients and moments of {memory.parameters:,} parameters and {_gib(memory.snapshot)} for a "
            "checkpoint's snapshot, which every GPU holds, however many there are"
        )

    def _step(self, expected: Expected, micro_batch: int, trainable: int, exchanged_bytes: int) -> Step:
        """`trainable`: parameters whose gradients are exchanged, in so many bytes each, beside the last backward."""
        compute = self.share / (expected.images_per_second * (self.options.assume_speed or 1.0))
        if self.gpus == 1 or self.options.bandwidth is None:
            return Step(compute, 0.0)
        seconds_per_byte = ring_seconds_per_byte(self.gpus, self.options.bandwidth * 1e9 / 8) * exchanged_bytes / 4
        backward = BACKWARD_SHARE * compute * micro_batch / self.share
        return Step(compute, waiting_seconds(4 * trainable, seconds_per_byte, backward))

    def _timm_gpu_hours(self) -> float | None:
        expected = self.estimator.expect(_TIMM, self.settings.model.image_size)
        if expected is None:
            return None
        step = self._step(expected, self.share, self.parameters[Phase.FULL][0], _EXCHANGED_BYTES["fp32"])
        return self.settings.train.epochs * self._epoch_gpu_hours(step)

    def _epoch_gpu_hours(self, step: Step) -> float:
        return self.gpus * self.steps * step.seconds / 3600

    def _spans(self, switch_epoch: int | None) -> dict[Phase, range]:
        return phase_spans(self.settings.train.epochs, switch_epoch, self.settings.method.warmup_epochs)

    def _gpu_hours(self, switch_epoch: int | None) -> dict[Phase, float]:
        return sum_by_phase(self.costs, self._spans(switch_epoch))

    def _name(self, switch_epoch: int | None) -> str:
        own = ", as here" if switch_epoch == self.source.switch_epoch else ""
        return "full training" if switch_epoch is None else f"switch after {switch_epoch}{own}"

    def _run(
        self, name: str, switch_epoch: int | None, gpu_hours: dict[Phase, float], full: float, timm: float | None
    ) -> RunPlan:
        total = sum(gpu_hours.values())
        return RunPlan(
            name=name,
            switch_epoch=switch_epoch,
            epochs={phase: len(span) for phase, span in self._spans(switch_epoch).items() if span},
            gpu_hours=gpu_hours,
            hours={phase: hours / self.gpus for phase, hours in gpu_hours.items()},
            total_gpu_hours=total,
            total_hours=total / self.gpus,
            of_full=total / full,
            of_timm=timm and total / timm,
            full_epochs=self.settings.train.epochs * total / full,
        )

    def _notes(self) -> list[str]:
        options, notes = self.options, list(self.source.notes)
        if options.assume_speed is not None:
            notes.append(f"assumed, not measured: {self.gpu}, in every phase and format")
        if self.gpus > 1 and options.bandwidth is None:
            notes.append("the exchange of gradients is taken for hidden, as inside a node's NVLink; --bandwidth GBIT counts it")
        if any(plan.is_estimated for plan in self.plans.values()):
            notes.append(
                "an estimate goes by operations: good to 10 % for another image size, up to 3 times too fast for a far smaller "
                "model; `prelora bench phases --model NAME --image-size N --out FILE` measures it"
            )
        small = [plan for plan in self.plans.values() if 2 * plan.micro_batch < plan.measured_batch]
        if small:
            notes.append(
                f"measured with {counted(small[0].measured_batch, 'image')} at once, here {small[0].micro_batch}: may be slower"
            )
        if self.without_subsets:
            notes.append(
                "what drop path as a subset spares is not counted in any phase: no file has it at this model.drop_path for "
                f"{' and '.join(self.without_subsets)}"
            )
        if self.settings.method.enabled and self.settings.method.freeze == "prefix":
            notes.append("what method.freeze = 'prefix' spares is not counted: the first adapted block is known at the switch")
        return [*notes, "not counted: starting and compiling, waiting for images, validation, checkpoints"]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
