"""What a sweep is: a recipe, the keys of the method that it searches, and how."""

from __future__ import annotations

import itertools
import math
import random
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prelora_ray.config import Address, BendSettings, FolderName, MethodSettings, Settings, acts, with_absolute_paths
from prelora_ray.config_file import parse_section, parse_settings, read_named, set_key
from prelora_ray.errors import UserError
from prelora_ray.measures import measures_of
from prelora_ray.section import Count, Section, Share, Whole

Candidate = dict[str, Any]
"""A value for each key that a sweep searches, such as {"method.tau": 0.5, "method.r_max": 32}. In files: a setting.

A control has one key more, `control`, which says what kind it is: `full` or `rank 1`."""

OF_THE_TEST = (
    "tau",
    "zeta",
    "windows",
    "window_epochs",
    "norm_statistic",
    "switch_epoch",
    "r_min",
    "r_max",
    "normalize",
    "rank_floor_percent",
)
"""Keys of the method that decide when a run switches and with which ranks, and nothing after."""
SEARCHABLE = tuple(
    f"method.{name}" for name in MethodSettings.model_fields if acts(f"method.{name}") == "switch" and name != "enabled"
)
"""Keys that all trials of one trunk may differ in: those of the method that act from the switch on."""


class Range(Section):
    """Numbers between two bounds, both included; whole ones where both bounds are."""

    min: float
    """Smallest value."""
    max: float
    """Largest value."""
    log: bool = False
    """Whether values are drawn evenly in their logarithm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.min < self.max:
            raise ValueError("must be a range whose min is below its max")
        if self.log and self.min <= 0:
            raise ValueError("must be a range from above 0 on, as log is true")
        return self

    @property
    def is_whole(self) -> bool:
        return self.min.is_integer() and self.max.is_integer()

    def draw(self, rng: random.Random) -> float:
        if self.log:
            value = math.exp(rng.uniform(math.log(self.min), math.log(self.max)))
            return round(value) if self.is_whole else value
        return rng.randint(int(self.min), int(self.max)) if self.is_whole else rng.uniform(self.min, self.max)


class AshaSettings(Section):
    grace_epochs: Count
    """Epochs of the run, those of the trunk counted, before a trial may be stopped."""
    reduction_factor: Annotated[int, Field(ge=2, strict=True)] = 3
    """At each rung one trial in so many goes on."""


class ControlSettings(Section):
    full: Literal["front", "all", "none"] = "front"
    """Beside which runs full training of equal cost is trained: those that no other run beats in accuracy and cost, all
    that switch, or none."""
    rank_1: Share = 0.0
    """A fork of rank 1 throughout is trained beside each switch that leaves at most this share of the learning rate's
    sum, such as 0.02: where it ends as high, the run says nothing of adapters."""


class SweepSettings(Section):
    """A sweep, as one YAML file describes it."""

    name: FolderName
    """Name of the sweep and of its folder; the same name again goes on with it. Default: the file's own."""
    storage: Address = "runs"
    """Folder, file share or bucket that holds the sweep's folder."""
    recipe: str
    """The runs' recipe, by its path from the folder of this file."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings that all runs have in place of the recipe's: {key.path: value}; a section's keys go beside its own."""
    space: dict[str, list[Any] | Range] = Field(default_factory=dict)
    """What is searched: {key: list of values, or {min, max, log}}."""
    settings: list[Candidate] = Field(default_factory=list)
    """Instead of a space: the settings to try, each {key: value}."""
    trunk_only: bool = False
    """Whether only the trunk is trained, to see where each setting would switch."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """All combinations; so many drawn ones; or Optuna's choice: TPE for one objective, NSGA-II for two."""
    num_settings: Count = 20
    """Settings that `random` and `optuna` try."""
    objectives: (
        Annotated[tuple[Literal["val_top1", "val_perplexity", "cost"], ...], Field(min_length=1, max_length=2)] | None
    ) = None
    """What is to be best: what runs of the recipe's task are compared by, the final top-1 or perplexity, and the cost
    of a straight run; null is the first of them alone."""
    asha: AshaSettings | None = None
    """Stops trials that fall behind (one objective only); null lets all run to their end."""
    controls: ControlSettings = ControlSettings()
    concurrent: Count | Literal["auto"] = "auto"
    """Trials at a time; auto is as many as the cluster has room for."""
    seed: Whole = 0
    """Seed of what is drawn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.space) == bool(self.settings):
            raise ValueError("space or settings must be given, one of them, such as space: {method.tau: [0.25, 0.5, 1.0]}")
        if len({tuple(candidate) for candidate in self.settings}) > 1:
            raise ValueError("settings differ in their keys: give each the same ones, in the same order")
        if self.settings and self.search != "grid":
            raise ValueError(f"search = {self.search!r} is not allowed with settings: it needs a space to choose from")
        place = "space" if self.space else "settings"
        for key in self.keys:
            if key not in SEARCHABLE:
                raise ValueError(
                    f"{place}.{key} is not allowed: trials share their trunk, so they differ in {', '.join(SEARCHABLE)} alone"
                )
        for key, values in self.space.items():
            if isinstance(values, Range) and self.search == "grid":
                raise ValueError(f"space.{key} is a range, of which search: grid knows no values: give a list of them")
            if values == []:
                raise ValueError(f"space.{key} = [] is not allowed: give at least one value")
        if self.trunk_only and self.search == "optuna":
            raise ValueError("search = 'optuna' is not allowed with trunk_only: it chooses by what trials come to")
        objectives = self.objectives or ()
        if self.asha and len(objectives) > 1:
            raise ValueError("asha is not allowed with two objectives: it ranks trials by one")
        if self.asha and objectives == ("cost",):
            raise ValueError("asha is not allowed with objective cost: a trial's cost is known from the start")
        if len(set(objectives)) < len(objectives):
            raise ValueError(f"objectives = {list(objectives)} is not allowed: one stands twice")
        return self

    @property
    def keys(self) -> list[str]:
        """Keys that the candidates differ in."""
        return list(self.space or self.settings[0])

    def values(self, key: str) -> list[Any] | Range | None:
        """What a key may be; None where it is not searched."""
        if key not in self.keys:
            return None
        return self.space[key] if self.space else [candidate[key] for candidate in self.settings]


def keys_without_effect(sweep: SweepSettings) -> list[str]:
    """A sentence for each key of the sweep that was given and has no effect."""
    given = sweep.model_fields_set
    why: dict[str, str] = {}
    if sweep.search == "grid":
        why |= dict.fromkeys(("num_settings", "seed"), "as a grid draws nothing")
    if sweep.search != "optuna":
        why["objectives"] = "as Optuna alone chooses by them"
    if sweep.trunk_only:
        why |= dict.fromkeys(("asha", "concurrent", "controls", "objectives"), "as trunk_only runs no trial")
    return [f"{key} has no effect, {reason}" for key, reason in why.items() if key in given]


class Plan:
    """A sweep's runs: the trunk, and the run of each candidate."""

    def __init__(self, sweep: SweepSettings, base: Settings) -> None:
        """`base`: the recipe's settings with the sweep's overrides.

        Paths become absolute, as trials run in folders of their own. Raises UserError where the space
        holds a candidate that is not allowed.
        """
        self.sweep = sweep
        base = with_absolute_paths(base.model_copy(update={"storage": sweep.storage}))
        self._base = base
        self._content = base.model_dump(mode="json", exclude_unset=True)  # what nobody set is no key without effect
        self._method = self._content.get("method", {})
        self.folder = f"{base.storage.rstrip('/')}/{sweep.name}"
        self.measure = measures_of(base.task)[0]
        """What runs are compared by."""
        self.objectives: tuple[str, ...] = sweep.objectives or (self.measure.key,)
        if other := set(self.objectives) - {self.measure.key, "cost"}:
            raise UserError(
                f"objectives = {list(self.objectives)} is not allowed: runs of task {base.task!r} are compared by "
                f"{self.measure.key}, and have no {other.pop()}"
            )
        if base.train.bend is not None:
            raise UserError("train.bend is not allowed in a sweep: the forks of its controls bend the schedule of its trunk")
        for candidate in self.candidates():
            self.settings_of(candidate, "check")
        if sweep.asha is not None and sweep.asha.grace_epochs > base.train.epochs:
            raise UserError(
                f"asha.grace_epochs = {sweep.asha.grace_epochs} is not allowed: it must not exceed train.epochs = "
                f"{base.train.epochs}"
            )

    @cached_property
    def trunk(self) -> Settings:
        """Full training to the end of the run, with a checkpoint wherever a candidate may switch."""
        epochs = math.gcd(*self._switch_grid())
        of_records = {"tau", "zeta", "windows", "norm_statistic", "targets"}
        method = {key: value for key, value in self._method.items() if key in of_records}
        method |= {"enabled": False, "window_epochs": epochs}
        every = math.gcd(epochs, self._base.checkpoint.every_epochs)
        checkpoint = {**self._content.get("checkpoint", {}), "keep_trunk": True, "every_epochs": every}
        return parse_settings({**self._content, **self._place("trunk"), "method": method, "checkpoint": checkpoint})

    def full_training(self, after: int, epochs: int, name: str) -> Settings:
        """Full training that leaves the trunk after so many epochs, and ends after `epochs` of them."""
        bend = BendSettings(after=after, of=self.trunk.train.epochs)
        train = self.trunk.train.model_copy(update={"epochs": epochs, "bend": bend})
        checkpoint = self._base.checkpoint.model_copy(update={"keep_trunk": False})
        return self.trunk.model_copy(update={**self._place(name), "train": train, "checkpoint": checkpoint})

    def settings_of(self, candidate: Candidate, name: str) -> Settings:
        """The settings of the run that a candidate asks for."""
        if candidate.get("control") == "full":
            return self.full_training(candidate["train.bend.after"], candidate["train.epochs"], name)
        method = {**self._method, "enabled": True}
        method |= {key.removeprefix("method."): value for key, value in candidate.items() if key != "control"}
        return parse_settings({**self._content, **self._place(name), "method": method})

    def candidates(self) -> list[Candidate]:
        """The given ones, all of a grid, or as many drawn ones as are to be tried."""
        space = self.sweep.space
        if self.sweep.settings:
            return list(self.sweep.settings)
        if self.sweep.search == "grid":
            lists = [values for values in space.values() if isinstance(values, list)]
            return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]
        rng = random.Random(self.sweep.seed)
        return [
            {key: values.draw(rng) if isinstance(values, Range) else rng.choice(values) for key, values in space.items()}
            for _ in range(self.sweep.num_settings)
        ]

    def _place(self, name: str) -> dict[str, str]:
        return {"storage": self.folder, "name": name}

    def _switch_grid(self) -> list[int]:
        """Numbers of epochs of which every possible switch epoch is a multiple of the greatest common divisor."""
        numbers: list[int] = []
        for key in ("window_epochs", "switch_epoch"):
            values = self.sweep.values(f"method.{key}") or [getattr(self._base.method, key)]
            numbers += [1] if isinstance(values, Range) else [value for value in values if value is not None]
        return numbers


def load_sweep(path: str, overrides: list[str], *, name: str | None = None, storage: str | None = None) -> Plan:
    """Reads a sweep's file and the recipe that it names. Raises UserError as `load_settings` does."""
    content = read_named(path, overrides, name=name, storage=storage)
    if isinstance(content.get("space"), dict):
        content["space"] = _with_whole_keys(content["space"])
    sweep = parse_section(SweepSettings, content)
    recipe = read_named(Path(path).parent / sweep.recipe)
    for key, value in sweep.overrides.items():
        set_key(recipe, key, value)
    return Plan(sweep, parse_settings(recipe))


def _with_whole_keys(space: dict[Any, Any]) -> dict[Any, Any]:
    """A space in which `{method: {tau: ...}}`, which `--set space.method.tau=...` makes, is `{method.tau: ...}`."""
    whole: dict[Any, Any] = {}
    for key, value in space.items():
        is_section = isinstance(value, dict) and "." not in str(key) and not value.keys() & Range.model_fields.keys()
        whole |= {f"{key}.{name}": inner for name, inner in value.items()} if is_section else {key: value}
    return whole
