"""Images a second by phase: our own step, and what the usual stacks make of the same work.

Our rows measure the whole training step: mixing, loss, clipping and optimizer included. The reference rows measure the
plain loop of their stack, on images that are on the device already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from prelora_ray.bench.machine import (
    check_rows,
    copy_rate,
    describe,
    free_memory,
    matrix_rate,
    measure_rows,
    missing_fp8,
    seconds_per_call,
)
from prelora_ray.bench.own import NUM_CLASSES, OwnRun, own_settings
from prelora_ray.config import ModelSettings
from prelora_ray.engine.check import check_model
from prelora_ray.engine.flops import forward_flops, training_passes
from prelora_ray.engine.model import timm_model
from prelora_ray.extras import check_installed
from prelora_ray.method.phases import Phase, count_parameters

Step = Callable[[], object]
_REFERENCE_RANK = 32
_TARGETS = r".*(attn\.(qkv|proj)|mlp\.fc[12])"
_HF_TARGETS = r".*layer.*(query|key|value|dense|o_proj|q_proj|k_proj|v_proj|fc1|fc2)"


@dataclass(frozen=True)
class Options:
    model: str
    image_size: int
    batch: int
    residual: Literal["fp32", "bf16"] = "fp32"
    """Of our own rows."""
    drop_path: float = 0.0
    """Above 0, rows with it as masks and as subsets follow: the same in every block, and timm's linear rule."""
    steps: int = 10
    """Steps in a round; a figure is the median of five rounds."""
    kernels: int = 0
    """Kernels to name for each row."""
    rows: tuple[str, ...] = ()
    """Beginnings of the names of rows to measure; all where it is empty."""

    def wants(self, row: str) -> bool:
        return not self.rows or any(row.startswith(beginning) for beginning in self.rows)


@dataclass(frozen=True)
class Row:
    name: str
    images_per_second: float
    milliseconds: float
    """Of a step, by wall clock."""
    peak_gib: float | None
    """Most memory allocated on the device; None on a CPU."""
    mfu: float
    """Operations of the model without adapters over what the measured rate of a bf16 matrix product allows. Backward
    counts twice the forward's; once, where the base is frozen. Residual branches left out count as computed."""
    trainable_share: float
    gradient_bytes: int
    """What data-parallel workers exchange in a step."""
    compiled_graphs: int = 0
    """Graphs that torch.compile made for it, each of which costs seconds at a start."""
    kernels: tuple[tuple[str, float], ...] = ()
    """Name and milliseconds a step of the kernels that take the most time on the device."""


def bench_phases(options: Options) -> dict[str, Any]:
    """Measures every row in this process, one after the other; `rows` and what they ran on, as JSON can hold it.

    `failed` says what ended it before its last row, or is None. Raises UserError for a model that cannot work, and for
    a row that there is not, or whose library is not installed.
    """
    check_rows(options.rows, row_names(options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_libraries(options, device)
    check_model(own_settings({"name": options.model, "image_size": options.image_size}, options.batch, options.batch, {}))
    rates = {"matrix_flops": matrix_rate(device), "copy_bytes_per_second": copy_rate(device)}
    bench = _Bench(options, device, rates["matrix_flops"])
    content = {"options": vars(options), **measure_rows(bench.rows(), lambda row: f"{row.images_per_second:.0f} images/s")}
    return {"benchmark": "phases", **describe(device), **rates, **content, "missing": bench.missing}


@dataclass(frozen=True)
class _OwnRows:
    """A run of our own, and the phases of it that are measured; adapters on all blocks but the first share of them."""

    title: str
    changes: dict[str, Any]
    """Of the settings, by section."""
    phases: tuple[Phase, ...] = (Phase.LORA,)
    first_share: float = 0.0

    def name(self, phase: Phase) -> str:
        return f"prelora {self.title} {phase}"


def _own_rows(drop_path: float) -> list[_OwnRows]:
    every = tuple(Phase)
    fp8, prefix = {"train": {"precision": "fp8", "fp8_from": "full"}}, {"method": {"freeze": "prefix"}}
    rows = [
        _OwnRows("bf16", {}, every),
        _OwnRows("bf16 plain", {"train": {"adapters": "plain"}}, (Phase.WARMUP, Phase.LORA)),
        _OwnRows("fp8", fp8, every),
        _OwnRows("bf16 last half", prefix, first_share=0.5),
        _OwnRows("fp8 last half", fp8 | prefix, first_share=0.5),
    ]
    if drop_path:
        for rule in ("uniform", "linear"):
            for form in ("mask", "subset"):
                keys = {"drop_path": drop_path, "drop_path_rule": rule, "drop_path_form": form}
                rows.append(_OwnRows(f"bf16 {rule} {form}", {"model": keys}, every))
                rows.append(_OwnRows(f"fp8 {rule} {form}", fp8 | {"model": keys}, every))
    return rows


def row_names(options: Options) -> list[str]:
    """Of all rows that there are with these options, wanted or not."""
    own = [rows.name(phase) for rows in _own_rows(options.drop_path) for phase in rows.phases]
    return [*_REFERENCES, *own]


class _Bench:
    def __init__(self, options: Options, device: torch.device, matrix_flops: float) -> None:
        self.options = options
        self.device = device
        self.matrix_flops = matrix_flops
        self.missing: dict[str, str] = {}
        """Why a row was not measured, by its name."""
        size = options.image_size
        self.images = torch.randn(options.batch, 3, size, size, device=device)
        self.labels = torch.randint(NUM_CLASSES, (options.batch,), device=device)
        self.model = ModelSettings(name=options.model, image_size=options.image_size)
        self.forward_flops = forward_flops(self.model, NUM_CLASSES)

    def rows(self) -> Iterator[Row]:
        for name, build in _REFERENCES.items():
            if not self.options.wants(name):
                continue
            if not _can_run(name, self.device):
                self.missing[name] = "needs a GPU"
                continue
            if name.startswith("HF") and not self._is_vit():
                self.missing[name] = "is for timm's VisionTransformer"
                continue
            free_memory(self.device)
            step, model = build(self)
            yield self._measure(name, step, model, phase=Phase.FULL if "full" in name else Phase.LORA)
            del step, model
        for own in _own_rows(self.options.drop_path):
            yield from self._own(own)

    def _is_vit(self) -> bool:
        from timm.models import VisionTransformer

        with torch.device("meta"):
            return isinstance(timm_model(self.model, NUM_CLASSES), VisionTransformer)

    def _measure(self, name: str, step: Step, model: nn.Module, *, phase: Phase) -> Row:
        compiled = _compiled_graphs()
        for _ in range(6):  # compiles, tunes, captures; the peak of memory is theirs: a graph's replay allocates nothing
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
            _compiled_graphs() - compiled,
            kernels,
        )

    def _own(self, own: _OwnRows) -> Iterator[Row]:
        wanted = [phase for phase in own.phases if self.options.wants(own.name(phase))]
        if not wanted:
            return
        if "fp8" in own.title and (missing := missing_fp8(self.device, *map(own.name, wanted))):
            self.missing |= missing
            return
        free_memory(self.device)
        options, changes = self.options, own.changes
        train = {"precision": "bf16", "residual": options.residual, "adapters": "merged", **changes.get("train", {})}
        model = {"name": options.model, "image_size": options.image_size, **changes.get("model", {})}
        settings = own_settings(model, options.batch, options.batch, train, changes.get("method"))
        run = OwnRun(settings, self.device, first_share=own.first_share)
        for phase in Phase:
            run.enter(phase)
            if phase in wanted:
                yield self._measure(own.name(phase), run.step, run.state.model, phase=phase)

    def _timm(self, *, compiled: bool) -> tuple[Step, nn.Module]:
        model = timm_model(self.model, NUM_CLASSES).to(self.device)
        return self._plain_step(torch.compile(model) if compiled else model, model), model

    def _timm_peft(self, *, compiled: bool) -> tuple[Step, nn.Module]:
        import peft

        model = timm_model(self.model, NUM_CLASSES)
        model = peft.get_peft_model(model, _peft_config(_TARGETS, "head")).to(self.device)
        return self._plain_step(torch.compile(model) if compiled else model, model), model

    def _hugging_face(self, *, adapters: bool) -> tuple[Step, nn.Module]:
        """The paper's stack: Hugging Face's ViT, fp16 autocast with a gradient scaler, eager."""
        from transformers import ViTConfig, ViTForImageClassification

        like: Any = timm_model(self.model, num_classes=0)
        config = ViTConfig(
            hidden_size=like.embed_dim,
            num_hidden_layers=len(like.blocks),
            num_attention_heads=like.blocks[0].attn.num_heads,
            intermediate_size=like.blocks[0].mlp.fc1.out_features,
            image_size=self.options.image_size,
            patch_size=like.patch_embed.patch_size[0],
        )
        config.num_labels = NUM_CLASSES
        model: Any = ViTForImageClassification(config)
        if adapters:
            import peft

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


_REFERENCES: dict[str, Callable[[_Bench], tuple[Step, nn.Module]]] = {
    "timm eager full": lambda bench: bench._timm(compiled=False),
    "timm compiled full": lambda bench: bench._timm(compiled=True),
    "timm + PEFT eager lora": lambda bench: bench._timm_peft(compiled=False),
    "timm + PEFT compiled lora": lambda bench: bench._timm_peft(compiled=True),
    "HF fp16 full": lambda bench: bench._hugging_face(adapters=False),
    "HF + PEFT fp16 lora": lambda bench: bench._hugging_face(adapters=True),
}


def _can_run(reference: str, device: torch.device) -> bool:
    return device.type == "cuda" or not ("compiled" in reference or "fp16" in reference)


def _check_libraries(options: Options, device: torch.device) -> None:
    """Raises UserError where a reference's library is not installed."""
    names = " ".join(name for name in _REFERENCES if options.wants(name) and _can_run(name, device))
    modules = [module for word, module in (("PEFT", "peft"), ("HF", "transformers")) if word in names]
    check_installed("prelora bench phases", "bench", *modules)


def _compiled_graphs() -> int:
    """By this process, so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


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
