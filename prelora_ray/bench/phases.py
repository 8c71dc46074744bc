"""Images a second by phase: our own step, and what the usual stacks make of the same work.

Our rows take the step of training whole: mixing, loss, clipping and optimizer included. The reference rows take the plain loop
of their stack over images that lie on the device already.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prelora_ray.bench.machine import copy_rate, describe, forget, matrix_rate, seconds_per_call
from prelora_ray.config import ModelSettings, Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch, StreamPlan
from prelora_ray.data.manifest import Manifest, Shard
from prelora_ray.engine.flops import forward_flops, training_passes
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.method.architecture import blocks_of
from prelora_ray.method.phases import Phase, count_parameters
from prelora_ray.train.batch_stream import stream_plan

logger = logging.getLogger(__name__)

Step = Callable[[], object]
RANKS = (8, 16, 32, 32, 32, 64, 64, 8, 32, 32)
"""Dealt out to the modules: 8 to 64, mean 32."""
_REFERENCE_RANK = 32
_NUM_CLASSES = 1000
_TARGETS = r".*(attn\.(qkv|proj)|mlp\.fc[12])"
_HF_TARGETS = r".*layer.*(query|key|value|dense|o_proj|q_proj|k_proj|v_proj|fc1|fc2)"


@dataclass(frozen=True)
class Options:
    model: str
    image_size: int
    batch: int
    residual: Literal["fp32", "bf16"] = "fp32"
    """Of our own rows."""
    steps: int = 10
    """Steps in a round; a figure is the median of five rounds."""
    kernels: int = 0
    """Kernels to name for each row."""
    rows: tuple[str, ...] = ()
    """Beginnings of the names of rows to measure; all where it is empty."""


@dataclass(frozen=True)
class Row:
    name: str
    images_per_second: float
    milliseconds: float
    """Of a step, by wall clock."""
    peak_gib: float | None
    """Most memory allocated on the device; None on a CPU."""
    mfu: float
    """Operations of the model without adapters over what the measured rate of a bf16 matrix product allows. Backward counts
    twice the forward's; once, where the base is frozen."""
    trainable_share: float
    gradient_bytes: int
    """What data-parallel workers exchange in a step."""
    kernels: tuple[tuple[str, float], ...] = ()
    """Name and milliseconds a step of the kernels that take the most time on the device."""


def bench_phases(options: Options) -> dict[str, Any]:
    """Measures every row in this process, one after the other; `rows` and what they ran on, as JSON can hold it.

    `failed` says what ended it before its last row, or is None.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {"matrix_flops": matrix_rate(device), "copy_bytes_per_second": copy_rate(device)}
    bench = _Bench(options, device, rates["matrix_flops"])
    rows, failed = [], None
    try:
        for row in bench.rows():
            logger.info("%s: %.0f images/s", row.name, row.images_per_second)
            rows.append(vars(row))
    except RuntimeError as error:  # after a fault of the device this process can use it no more; what was measured stands
        logger.debug("", exc_info=True)
        failed = str(error).splitlines()[0]
    except KeyboardInterrupt:
        failed = "interrupted"
    content = {"options": vars(options), "rows": rows, "missing": bench.missing, "failed": failed}
    return {"benchmark": "phases", **describe(device), **rates, **content}


class _Bench:
    def __init__(self, options: Options, device: torch.device, matrix_flops: float) -> None:
        self.options = options
        self.device = device
        self.matrix_flops = matrix_flops
        self.missing: dict[str, str] = {}
        """Why a row was not measured, by its name."""
        size = options.image_size
        self.images = torch.randn(options.batch, 3, size, size, device=device)
        self.labels = torch.randint(_NUM_CLASSES, (options.batch,), device=device)
        model = ModelSettings(name=options.model, image_size=options.image_size)
        self.forward_flops = forward_flops(model, _NUM_CLASSES)

    def rows(self) -> Iterator[Row]:
        on_gpu = self.device.type == "cuda"
        references: dict[str, Callable[[], tuple[Step, nn.Module]]] = {
            "timm eager full": lambda: self._timm(compiled=False),
            "timm compiled full": lambda: self._timm(compiled=True),
            "timm + PEFT eager lora": lambda: self._timm_peft(compiled=False),
            "timm + PEFT compiled lora": lambda: self._timm_peft(compiled=True),
            "HF fp16 full": lambda: self._hugging_face(adapters=False),
            "HF + PEFT fp16 lora": lambda: self._hugging_face(adapters=True),
        }
        for name, build in references.items():
            if not self._wanted(name):
                continue
            if not on_gpu and ("compiled" in name or "fp16" in name):
                self.missing[name] = "needs a GPU"
                continue
            forget(self.device)
            step, model = build()
            yield self._measure(name, step, model, phase=Phase.FULL if "full" in name else Phase.LORA)
            del step, model
        fp8, prefix = {"train": {"precision": "fp8", "fp8_from": "full"}}, {"method": {"freeze": "prefix"}}
        yield from self._own("bf16", {}, phases=list(Phase))
        yield from self._own("bf16 plain", {"train": {"adapters": "plain"}}, phases=(Phase.WARMUP, Phase.LORA))
        yield from self._own("fp8", fp8, phases=list(Phase))
        yield from self._own("bf16 last half", prefix, first_share=0.5)
        yield from self._own("fp8 last half", fp8 | prefix, first_share=0.5)

    def _wanted(self, name: str) -> bool:
        return not self.options.rows or any(name.startswith(row) for row in self.options.rows)

    def _measure(self, name: str, step: Step, model: nn.Module, *, phase: Phase) -> Row:
        for _ in range(6):  # compiles, tunes, captures; the peak of memory is theirs, as a graph's replay allocates nothing
            step()
        seconds = seconds_per_call(step, self.device, self.options.steps)
        trainable, parameters = count_parameters(model)
        kernels = _top_kernels(step, self.options.kernels) if self.options.kernels and self.device.type == "cuda" else ()
        flops = self.forward_flops * self.options.batch * training_passes(phase)
        return Row(
            name,
            self.options.batch / seconds,
            seconds * 1e3,
            torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None,
            flops / seconds / self.matrix_flops,
            trainable / parameters,
            sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
            kernels,
        )

    def _own(
        self, title: str, changes: dict[str, Any], phases: Sequence[Phase] = (Phase.LORA,), first_share: float = 0.0
    ) -> Iterator[Row]:
        """A run's phases, of which some are measured; adapters on all blocks but the first share of them."""
        names = {phase: f"prelora {title} {phase}" for phase in Phase}
        wanted = [phase for phase in phases if self._wanted(names[phase])]
        if not wanted:
            return
        if "fp8" in title and (self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) < (8, 9)):
            self.missing.update(dict.fromkeys((names[phase] for phase in wanted), "needs a GPU with products of e4m3"))
            return
        forget(self.device)
        settings = _settings(self.options, changes)
        plan = _plan(settings, self.options.batch)
        state = TrainState(settings, _NUM_CLASSES, 10**6, self.device, world_size=1)
        train_step, batch = TrainStep(state, plan), self._batch()
        if wanted[0] is Phase.FULL:
            yield self._measure(names[Phase.FULL], lambda: train_step.train(batch), state.model, phase=Phase.FULL)
        ranks = _ranks([t.name for t in state.targets if t.layer >= first_share * len(blocks_of(state.model))])
        state.enter(Phase.WARMUP, ranks)
        forget(self.device)
        if Phase.WARMUP in wanted:
            yield self._measure(names[Phase.WARMUP], lambda: train_step.train(batch), state.model, phase=Phase.WARMUP)
        state.enter(Phase.LORA)
        forget(self.device)
        if Phase.LORA in wanted:
            yield self._measure(names[Phase.LORA], lambda: train_step.train(batch), state.model, phase=Phase.LORA)

    def _batch(self) -> Batch:
        size = self.options.image_size
        images = torch.randint(256, (self.options.batch, size, size, 3), dtype=torch.uint8)
        return Batch("train", 0, 0, images, self.labels.cpu(), np.arange(self.options.batch))

    def _timm(self, *, compiled: bool) -> tuple[Step, nn.Module]:
        import timm

        model = timm.create_model(self.options.model, img_size=self.options.image_size, num_classes=_NUM_CLASSES)
        model = model.to(self.device)
        return self._plain_step(torch.compile(model) if compiled else model, model), model

    def _timm_peft(self, *, compiled: bool) -> tuple[Step, nn.Module]:
        import peft
        import timm

        model = timm.create_model(self.options.model, img_size=self.options.image_size, num_classes=_NUM_CLASSES)
        model = peft.get_peft_model(model, _peft_config(_TARGETS, "head")).to(self.device)
        return self._plain_step(torch.compile(model) if compiled else model, model), model

    def _hugging_face(self, *, adapters: bool) -> tuple[Step, nn.Module]:
        """The paper's stack: Hugging Face's ViT, fp16 autocast with a gradient scaler, eager."""
        import peft
        import timm
        from transformers import ViTConfig, ViTForImageClassification

        like = timm.create_model(self.options.model, img_size=self.options.image_size, num_classes=0)
        config = ViTConfig(
            hidden_size=like.embed_dim,
            num_hidden_layers=len(like.blocks),
            num_attention_heads=like.blocks[0].attn.num_heads,
            intermediate_size=like.blocks[0].mlp.fc1.out_features,
            image_size=self.options.image_size,
            patch_size=like.patch_embed.patch_size[0],
        )
        config.num_labels = _NUM_CLASSES
        model: Any = ViTForImageClassification(config)
        if adapters:
            model = peft.get_peft_model(model, _peft_config(_HF_TARGETS, "classifier"))
        model = model.to(self.device)
        return self._plain_step(lambda images: model(images).logits, model, dtype=torch.float16), model

    def _plain_step(self, forward: Callable[..., Any], model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Step:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.05, fused=self.device.type == "cuda")
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

        def step() -> None:
            with torch.autocast(self.device.type, dtype):
                loss = F.cross_entropy(forward(self.images), self.labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        model.train()
        return step


def _top_kernels(step: Step, count: int, steps: int = 3) -> tuple[tuple[str, float], ...]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:count]
    return tuple((event.key, event.self_device_time_total / steps / 1e3) for event in found)


def _peft_config(targets: str, head: str) -> Any:
    import peft

    return peft.LoraConfig(r=_REFERENCE_RANK, lora_alpha=2 * _REFERENCE_RANK, target_modules=targets, modules_to_save=[head])


def _settings(options: Options, changes: dict[str, Any]) -> Settings:
    return parse_settings(
        {
            "name": "bench",
            "data": {"path": "none", "batch_size": options.batch, "cell": 1},
            "model": {"name": options.model, "image_size": options.image_size},
            "train": {"precision": "bf16", "residual": options.residual, "adapters": "merged", **changes.get("train", {})},
            "method": changes.get("method", {}),
        }
    )


def _plan(settings: Settings, batch: int) -> StreamPlan:
    shard = Shard("none", (batch,), 0, "")
    manifest = Manifest(tuple(map(str, range(_NUM_CLASSES))), {"train": (shard,), "val": (shard,)}, 0, {})
    return stream_plan(settings, manifest, rank=0, world_size=1)


def _ranks(names: list[str]) -> dict[str, int]:
    dealt = [RANKS[i % len(RANKS)] for i in range(len(names))]
    random.Random(0).shuffle(dealt)
    return dict(zip(names, dealt, strict=True))
