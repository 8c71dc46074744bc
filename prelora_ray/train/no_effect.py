"""What a user gave and a run has no use for: said as it begins, and no error, as a recipe may serve several runs."""

from __future__ import annotations

from prelora_ray.config import OF_DROP_PATH, Settings
from prelora_ray.method.convergence import first_verdict
from prelora_ray.method.phases import Phase


def without_effect(settings: Settings) -> list[str]:
    """A sentence for each setting that was given and has no effect."""
    method, augment, train = settings.method, settings.augment, settings.train
    given = method.model_fields_set - {"enabled"}
    sentences = []
    if not method.enabled:
        used = {"window_epochs", "windows", "tau", "zeta", "norm_statistic", "targets"}  # what records and replay use
        sentences += [f"method.{key} has no effect, as method.enabled is false" for key in sorted(given - used)]
    elif method.rank_pattern is not None:
        sentences += [
            f"method.{key} has no effect, as method.rank_pattern gives the ranks"
            for key in sorted(given & {"r_min", "r_max", "normalize", "rank_floor_percent"})
        ]
    first = first_verdict(method.windows, method.window_epochs, train.ramp_epochs)
    if method.enabled and method.switch_epoch is None and train.epochs <= first:
        sentences.append(
            f"the run cannot switch: a verdict that rests on no window of train.ramp_epochs = {train.ramp_epochs} comes after "
            f"epoch {first} of {train.epochs} at the earliest, so set a smaller method.window_epochs or train.ramp_epochs, or "
            "method.switch_epoch"
        )
    if 0 < len({"query", "key", "value"} & set(method.targets or ())) < 3 and method.enabled:
        sentences.append("method.targets has some of query, key and value: phase lora freezes a fused qkv as a whole")
    if "decay_share" in train.model_fields_set and train.schedule != "constant-then-decay":
        sentences.append(f"train.decay_share has no effect, as train.schedule is {train.schedule}")
    if "residual" in train.model_fields_set and train.precision in ("fp32", "fp64"):
        sentences.append(f"train.residual has no effect, as train.precision is {train.precision}")
    if "gradient_exchange" in train.model_fields_set and settings.workers.max == 1:
        sentences.append("train.gradient_exchange has no effect, as workers.max is 1")
    if "cuda_graph" in train.model_fields_set and train.cuda_graph and train.optimizer != "adamw":
        sentences.append(f"train.cuda_graph has no effect, as train.optimizer is {train.optimizer}")
    if "fp8_from" in train.model_fields_set and train.precision != "fp8":
        sentences.append(f"train.fp8_from has no effect, as train.precision is {train.precision}")
    is_trunk = settings.checkpoint.keep_trunk  # its forks switch
    if train.precision == "fp8" and train.fp8_from is not Phase.FULL and not (method.enabled or is_trunk):
        sentences.append(
            f"train.precision = fp8 has no effect, as method.enabled is false and train.fp8_from is {train.fp8_from}"
        )
    if "adapters" in train.model_fields_set and not (method.enabled or is_trunk):
        sentences.append("train.adapters has no effect, as method.enabled is false")
    if train.adapters == "plain" and train.precision == "fp8" and train.fp8_from is not Phase.LORA:
        sentences.append(f"train.adapters has no effect, as train.precision is fp8 with train.fp8_from {train.fp8_from}")
    if settings.model.drop_path == 0:
        given = {f"model.{key}" for key in settings.model.model_fields_set}
        sentences += [f"{key} has no effect, as model.drop_path is 0" for key in OF_DROP_PATH if key in given]
    if {"padding"} & augment.model_fields_set and augment.crop != "padded":
        sentences.append(f"augment.padding has no effect, as augment.crop is {augment.crop}")
    if {"min_scale"} & augment.model_fields_set and augment.crop != "random_resized":
        sentences.append(f"augment.min_scale has no effect, as augment.crop is {augment.crop}")
    return sentences
