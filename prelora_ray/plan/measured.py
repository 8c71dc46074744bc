"""Speed and memory from the files of `prelora bench phases --out`, and what they come to for another model or size."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from prelora_ray.config import ModelSettings
from prelora_ray.engine.flops import training_passes
from prelora_ray.errors import UserError
from prelora_ray.method.phases import Phase
from prelora_ray.plan.cost import state_bytes
from prelora_ray.plan.sizes import ForwardSize, forward_size
from prelora_ray.section import rule

_SHIPPED = Path(__file__).parent / "measured"
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


class _Row(BaseModel):
    name: Annotated[str, Field(pattern=rf"(^| )({'|'.join(Phase)})$")]
    images_per_second: _Positive
    peak_gib: _Positive | None
    mfu: _Positive
    trainable_share: Annotated[float, Field(gt=0, le=1)]
    gradient_bytes: _Count


class _Options(BaseModel):
    model: str
    image_size: _Count
    batch: _Count
    residual: Literal["fp32", "bf16"]
    drop_path: Annotated[float, Field(ge=0, le=1)] = 0.0


class _File(BaseModel):
    """What a plan reads of a file; the rest is for people."""

    benchmark: Literal["phases"]
    device: str
    memory_gib: _Positive | None = None
    matrix_flops: _Positive
    options: _Options
    rows: list[_Row]


@dataclass(frozen=True)
class Measurement:
    """A row of a file."""

    name: str
    model: str
    image_size: int
    residual: str
    batch: int
    """Images at once."""
    images_per_second: float
    bytes_per_image: float | None
    """Of the peak of memory; None on a CPU."""
    forward_flops: float
    """Of one image."""


@dataclass(frozen=True)
class Bench:
    """What was measured on one kind of GPU."""

    device: str
    memory_gib: float | None
    """None where the files do not tell."""
    rows: tuple[Measurement, ...]


@dataclass(frozen=True)
class Expected:
    """What a GPU is expected to do of a workload, computing alone."""

    images_per_second: float
    bytes_per_image: float | None
    batch: int
    """Images at once in the row that it rests on."""
    is_estimated: bool
    """By the operations of another model or image size."""
    source: str
    """`measured`, or what it is estimated from."""


class Estimator:
    """Takes what was measured to the sizes of a recipe's model: time goes by operations, memory by layers' outputs."""

    def __init__(self, bench: Bench, model: ModelSettings, residual: str, num_classes: int) -> None:
        self._rows = bench.rows
        self._model = model
        self._residual = residual
        self._num_classes = num_classes
        self._sizes: dict[int, ForwardSize] = {}

    def expect(self, name: str, image_size: int) -> Expected | None:
        """By the nearest of the rows of this name; None where there is none."""
        rows = [row for row in self._rows if row.name == name]
        if not rows:
            return None
        as_it_is = [row for row in rows if self._is_of_this_model(row) and row.image_size == image_size]
        row = min(as_it_is or rows, key=lambda row: self._distance(row, image_size))
        residual = "" if row.residual == self._residual else f" with train.residual: {row.residual}"
        if as_it_is:
            return Expected(row.images_per_second, row.bytes_per_image, row.batch, False, f"measured{residual}")
        own = self._size(image_size)
        other = _size_of_row(row.model, row.image_size)
        return Expected(
            row.images_per_second * row.forward_flops / own.flops,
            None if row.bytes_per_image is None else row.bytes_per_image * own.outputs / other.outputs,
            row.batch,
            True,
            f"estimated from {row.model} at {row.image_size}{residual}",
        )

    def _is_of_this_model(self, row: Measurement) -> bool:
        return row.model == self._model.name and not self._model.options

    def _distance(self, row: Measurement, image_size: int) -> tuple[bool, bool, float]:
        is_same_size = self._is_of_this_model(row) and row.image_size == image_size
        flops = 0.0 if is_same_size else abs(math.log(row.forward_flops / self._size(image_size).flops))
        return not self._is_of_this_model(row), row.residual != self._residual, flops

    def _size(self, image_size: int) -> ForwardSize:
        if image_size not in self._sizes:
            model = self._model.model_copy(update={"image_size": image_size})
            self._sizes[image_size] = forward_size(model, self._num_classes)
        return self._sizes[image_size]


@functools.cache
def _size_of_row(model: str, image_size: int) -> ForwardSize:
    return forward_size(ModelSettings(name=model, image_size=image_size), num_classes=1000)


def read_benches(paths: Sequence[str], gpu: str | None) -> Bench:
    """The rows of these files, of GPUs with `gpu` in their name.

    Where there are no paths they are the files that come with the project, and `gpu` is H100 if not given. Raises
    UserError where a file is none, or they are of no such GPU, or of several kinds.
    """
    if not paths and gpu is None:
        gpu = "H100"
    files = [_read(Path(path)) for path in paths or sorted(map(str, _SHIPPED.glob("*.json")))]
    devices = sorted({file.device for file in files})
    chosen = [device for device in devices if gpu is None or gpu.lower() in device.lower()]
    if not chosen:
        raise UserError(
            f"--gpu {gpu} is not allowed: measured is {' and '.join(devices)}; give --bench FILE, as `prelora bench phases "
            "--out FILE` writes it on such a GPU, or how it compares, such as --gpu H100 --assume-speed 0.4"
        )
    if len(chosen) > 1:
        raise UserError(f"--gpu must name one of {' and '.join(chosen)}: the files are of several kinds")
    own = [file for file in files if file.device == chosen[0]]
    memory = next((file.memory_gib for file in own if file.memory_gib is not None), None)
    return Bench(chosen[0], memory, tuple(_measurement(file, row) for file in own for row in file.rows))


def _read(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--bench {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        told = first["msg"] if first["type"] == "json_invalid" else f"{place} must be {rule(first)}"
        raise UserError(f"--bench {path} is not what `prelora bench phases --out FILE` writes ({told})") from None


def _measurement(file: _File, row: _Row) -> Measurement:
    trainable = row.gradient_bytes // 4
    bytes_per_image = None
    if row.peak_gib is not None:
        rest = state_bytes(trainable, round(trainable / row.trainable_share))
        bytes_per_image = max(0.0, row.peak_gib * 2**30 - rest) / file.options.batch
    seconds = 1 / row.images_per_second
    flops = row.mfu * file.matrix_flops * seconds / training_passes(Phase(row.name.split()[-1]))
    options = file.options
    return Measurement(
        row.name.replace(" subset ", f" subset {options.drop_path:g} "),  # as `prelora bf16 uniform subset 0.4 full`
        options.model,
        options.image_size,
        options.residual,
        options.batch,
        row.images_per_second,
        bytes_per_image,
        flops,
    )
