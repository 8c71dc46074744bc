"""The commands as functions of Python. Each imports what it needs once it is called."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prelora_ray.config import Settings
    from prelora_ray.config_file import Override
    from prelora_ray.inference.evaluate import EvaluationReport
    from prelora_ray.inference.export import Exported
    from prelora_ray.inference.load import TrainedModel
    from prelora_ray.recorded.replay import Replay

Path = str | os.PathLike[str]


def train(
    recipe: Path,
    overrides: Iterable[str] = (),
    *,
    name: str | None = None,
    storage: Path | None = None,
    fast: bool = False,
    debug: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Trains a run through full, warmup and lora, or resumes it; shows it on standard error, as the command does.

    `recipe` is a file, or the name of a recipe that comes with the package, such as `digits`. `changes` are settings in
    place of the recipe's: of a section, as in `train={"epochs": 20}`, or one alone, as in `**{"train.epochs": 20}`;
    `overrides` are the same as the command's `--set` takes them, `train.epochs=20`. `name` and `storage` say where the
    run folder lies. `fast` makes it a smoke run. `debug` shows the workers' output.

    Starts a Ray of its own, for the time of the run, unless Ray is running or RAY_ADDRESS names a cluster.

    Returns what result.json holds, and the run folder's `path`. Raises UserError for settings that cannot work;
    WorkError where the work fails; InterruptedRunError on Ctrl-C. The same call goes on from the last checkpoint, but
    for a smoke run without a name.
    """
    told = [overrides] if isinstance(overrides, str) else overrides
    given: list[Override] = [*told, *((key, _plain(value)) for key, value in changes.items())]
    settings = settings_of(recipe, given, name=name, storage=storage, fast=fast)

    from prelora_ray.run_folder import RunFolder
    from prelora_ray.terminal.live import watch
    from prelora_ray.train.run import train as run

    with watch(settings):
        result = run(settings, debug=debug)
    return {**result, "path": str(RunFolder.of(settings))}


def settings_of(recipe: Path, overrides: Iterable[Override], *, name: str | None, storage: Path | None, fast: bool) -> Settings:
    """The settings of the run that `train` trains."""
    from prelora_ray.config_file import load_settings
    from prelora_ray.train.smoke import smoke_run

    place = None if storage is None else os.fspath(storage)
    return (smoke_run if fast else load_settings)(os.fspath(recipe), overrides, name=name, storage=place)


def load(source: Path) -> TrainedModel:
    """Loads a trained model on the CPU: a run's newest checkpoint, a checkpoint, an export or one of its forms.

    A run and its checkpoints may lie in a bucket. `load(...).predict("image.png")` classifies an image, and
    `load(...).module` is the model itself. Raises UserError where `source` is none of these, or is not whole.
    """
    from prelora_ray.inference.load import load_trained

    return load_trained(os.fspath(source))


def evaluate(source: Path, data: Path | None = None, *, debug: bool = False) -> EvaluationReport:
    """Evaluates what `load` takes on the validation images of a prepared folder; default: the one of the run.

    Uses a GPU where Ray has one, and starts a Ray of its own as `train` does. Raises UserError where there is no such
    model or data, or their classes differ; DamagedDataError where an image cannot be read.
    """
    from prelora_ray.inference.evaluate import evaluate as run
    from prelora_ray.ray_session import ray_session
    from prelora_ray.terminal.console import progress

    with ray_session(debug=debug), progress("images") as show:
        return run(os.fspath(source), None if data is None else os.fspath(data), show)


def export(source: Path, out: Path, data: Path | None = None, *, ema: bool = False) -> Exported:
    """Exports a run, or a checkpoint of it, for timm, PEFT and ONNX into the new folder `out`; with `ema` its
    averaged weights.

    Each form is loaded back and compared with the run's own model over validation images of `data`, by default those
    that the run was trained with; `out` appears only if all agree. A form whose library is not installed is left out.
    Raises UserError where `source`, `out` or `data` will not do, or there are no averaged weights; ExportError where a
    form differs.
    """
    from prelora_ray.inference.export import export as run

    return run(os.fspath(source), os.fspath(out), None if data is None else os.fspath(data), ema=ema)


def replay(source: Path, *, ramp_epochs: int | None = None, **changes: Any) -> Replay:
    """Tells where other settings of the test would have switched a recorded run, and with which ranks.

    `source` is a run folder or a norms.jsonl. `changes` are keys of a recipe's section `method`, such as `tau=0.5`, and
    `ramp_epochs` those of the learning-rate ramp; what is not given is the run's own. Raises UserError where there is
    no record, it is damaged, or a setting is not allowed.
    """
    from prelora_ray.recorded.replay import changed_method, read_record
    from prelora_ray.recorded.replay import replay as run

    record = read_record(os.fspath(source))
    return run(record, changed_method(record, changes), record.ramp_epochs if ramp_epochs is None else ramp_epochs)


def _plain(value: Any) -> Any:
    """Paths as settings have them, which is text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value
