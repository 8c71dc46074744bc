"""A sweep on Ray Tune: the trunk once, then one trial for each run that its candidates stand for."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from prelora_ray.config import Settings
from prelora_ray.errors import InterruptedRunError, WorkError, one_line
from prelora_ray.extras import check_installed
from prelora_ray.fault_tolerance.lock import HeldRunError
from prelora_ray.fault_tolerance.ray_private import let_trials_be_stopped, release, release_groups_of_dead_actors
from prelora_ray.measures import Measure
from prelora_ray.ray_session import ray_session
from prelora_ray.recorded.replay import read_record
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.summaries import reservations
from prelora_ray.sweep.cost import Prices
from prelora_ray.sweep.fork import fork
from prelora_ray.sweep.outcome import outcome
from prelora_ray.sweep.result import is_finished, read_notes, summarize_sweep, write_note
from prelora_ray.sweep.settings import Candidate, Plan, Range, keys_without_effect
from prelora_ray.train.run import train

logger = logging.getLogger(__name__)

_TRIAL_CPUS = 0.01
"""What a trial's own process asks for; its workers ask for theirs."""
_POLL_SECONDS = 2.0
"""Between polls whether another trial is done with the run that both stand for."""


def sweep(plan: Plan, watch: Callable[[Settings], AbstractContextManager[None]], *, debug: bool = False) -> dict[str, Any]:
    """Runs a sweep to its end, from wherever it stands, and returns the contents of sweep.json.

    `watch` shows the trunk's progress for the time of a block. A trial that fails is told and does not
    end the sweep. Raises as `train` does, UserError where Optuna is to search and is not installed, and WorkError where
    every trial fails.
    """
    if plan.sweep.search == "optuna":
        check_installed("prelora sweep with search = 'optuna'", "sweep", "optuna")
    for sentence in keys_without_effect(plan.sweep):
        logger.warning("%s", sentence)
    with ray_session(debug=debug):
        trunk = plan.trunk
        with watch(trunk):
            train(trunk, debug=debug)
        notes = read_notes(plan)
        for note in [*notes, *read_notes(plan, "controls")]:
            if note["ended"] == "failed":  # is tried again
                write_note(plan, note["setting"], ended=None, message=None)
        if not plan.sweep.trunk_only:
            _search(plan, [note["setting"] for note in notes])
            _train_controls(plan)
    result = summarize_sweep(plan)
    Storage(plan.folder).write_json("sweep.json", result)
    ended = [entry["ended"] for entry in result["settings"]]
    if None in [*ended, *(entry["ended"] for entry in result["controls"])] and not plan.sweep.trunk_only:
        raise InterruptedRunError(f"interrupted; the same command goes on with {plan.folder}")
    if set(ended) == {"failed"}:
        raise WorkError(f"every trial failed: {result['settings'][0]['message']}")
    return result


def _search(plan: Plan, earlier: list[dict[str, Any]]) -> None:
    """Trains what candidates stand for: those of a grid, drawn ones, or Optuna's, which begin with the `earlier`."""
    sweep = plan.sweep
    if sweep.search == "optuna":
        space = {key: _dimension(values) for key, values in sweep.space.items()}
        return _tune(plan, space, _asha(plan), _optuna(plan, earlier), sweep.num_settings)
    trunk = read_record(str(RunFolder.of(plan.trunk)))
    distinct = {outcome(plan, candidate, trunk).trial: candidate for candidate in reversed(plan.candidates())}
    if sweep.asha is None:  # which would have to hear of finished runs too
        distinct = {name: candidate for name, candidate in distinct.items() if not is_finished(plan, name)}
    if distinct:
        _tune(plan, {"setting": tune.grid_search([distinct[name] for name in sorted(distinct)])}, _asha(plan))


def _train_controls(plan: Plan) -> None:
    """Once all settings are tried: what the controls cost follows from their runs."""
    result = summarize_sweep(plan)
    missing = [entry["setting"] for entry in result["controls"] if entry["ended"] != "finished"]
    if missing and None not in [entry["ended"] for entry in result["settings"]]:
        _tune(plan, {"setting": tune.grid_search(missing)})


def _tune(
    plan: Plan,
    space: dict[str, Any],
    scheduler: ASHAScheduler | None = None,
    search: OptunaSearch | None = None,
    num_samples: int = 1,
) -> None:
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, plan=plan), {"CPU": _TRIAL_CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search, scheduler=scheduler, num_samples=num_samples, max_concurrent_trials=_concurrent(plan)
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"), storage_path=f"{plan.folder}/tune", callbacks=[_Ends(plan)], verbose=0
        ),
    )
    tuner.fit()


def _dimension(values: list[Any] | Range) -> Any:
    if isinstance(values, list):
        return tune.choice(values)
    if values.is_whole:
        return (tune.lograndint if values.log else tune.randint)(int(values.min), int(values.max) + 1)
    return (tune.loguniform if values.log else tune.uniform)(values.min, values.max)


def _optuna(plan: Plan, earlier: list[dict[str, Any]]) -> OptunaSearch:
    """Earlier candidates come first: their runs are there, so a search that goes on learns from them at once."""
    sweep, objectives = plan.sweep, plan.objectives
    modes = [_mode(plan.measure) if objective == plan.measure.key else "min" for objective in objectives]
    seed = sweep.seed + len(earlier)  # what is drawn after them is not to be what was drawn before
    if len(modes) == 1:
        return OptunaSearch(metric=objectives[0], mode=modes[0], points_to_evaluate=earlier, seed=seed)
    import optuna  # an extra

    sampler = optuna.samplers.NSGAIISampler(seed=seed)
    return OptunaSearch(metric=list(objectives), mode=modes, points_to_evaluate=earlier, sampler=sampler)


def _mode(measure: Measure) -> str:
    return "min" if measure.lower_is_better else "max"


def _asha(plan: Plan) -> ASHAScheduler | None:
    if plan.sweep.asha is None:
        return None
    return ASHAScheduler(
        time_attr="epochs_done",
        metric=plan.measure.key,
        mode=_mode(plan.measure),
        max_t=plan.trunk.train.epochs + 1,  # it stops a trial that reports so many
        grace_period=plan.sweep.asha.grace_epochs,
        reduction_factor=plan.sweep.asha.reduction_factor,
    )


def _concurrent(plan: Plan) -> int:
    """As many trials as have room for their workers, with a CPU beside each trial's for Ray Data."""
    if plan.sweep.concurrent != "auto":
        return plan.sweep.concurrent
    workers, has = plan.trunk.workers, ray.cluster_resources()
    room = has.get("CPU", 1) / (workers.max * workers.cpus + 1)
    gpus = has.get("GPU", 0)
    if workers.take_gpus(gpus):
        room = min(room, gpus / workers.max)
    return max(1, int(room))


def _trial(config: dict[str, Any], plan: Plan) -> None:
    """A trial, in a process of its own. Why it failed goes into its candidate's note."""
    let_trials_be_stopped()
    candidate = config.get("setting", config)
    was_stopped = write_note(plan, candidate, message=None)["ended"] == "stopped"
    try:
        _train_or_go_on(plan, candidate, was_stopped=was_stopped)
    except Exception as error:
        write_note(plan, candidate, message=one_line(error))
        raise


def _train_or_go_on(plan: Plan, candidate: Candidate, *, was_stopped: bool) -> None:
    """Trains the run that a candidate stands for; of one that was stopped, only reports what it did."""
    trunk = RunFolder.of(plan.trunk)
    found = outcome(plan, candidate, read_record(str(trunk)))
    is_trunk = found.trial == plan.trunk.name
    settings = plan.trunk if is_trunk else plan.settings_of(candidate, found.trial)
    run = RunFolder.of(settings)
    if not is_trunk:
        _once_free(lambda: fork(trunk, settings))
        for line in run.epochs():  # trained before: the scheduler is to know
            if line.attempt >= 0:
                tune.report(_heard(line.epoch, line.phase, plan.measure, getattr(line, plan.measure.key)))
    if was_stopped:
        return
    _once_free(lambda: train(settings, callbacks=[_Report(plan.measure)]))
    lines = run.epochs()
    heard = _heard(lines[-1].epoch, lines[-1].phase, plan.measure, getattr(lines[-1], plan.measure.key))
    tune.report({**heard, "cost": Prices.of(trunk).straight(lines, settings), "finished": True})


def _once_free(work: Callable[[], object]) -> None:
    """Does the work on a run, once no other trial works on it: its candidate may stand for the same run."""
    while True:
        try:
            work()
            return
        except HeldRunError:
            time.sleep(_POLL_SECONDS)


class _Report(TuneReportCallback):
    """Tells Tune of each epoch what it needs."""

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self._measure = measure

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        heard = _heard(metrics[0]["epoch"], metrics[0]["phase"], self._measure, metrics[0][self._measure.key])
        super().after_report(run_context, [heard], None)


def _heard(epoch: int, phase: str, measure: Measure, value: float | None) -> dict[str, Any]:
    """What Tune compares: it wants every objective at every report, also where it is not known."""
    known = math.nan if value is None else value
    return {"epochs_done": epoch + 1, "phase": phase, measure.key: known, "cost": math.nan}


class _Ends(tune.Callback):
    """Notes and tells how trials end, and gives back the room of those that Tune stopped."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._trunk = read_record(str(RunFolder.of(plan.trunk)))
        self._done = 0
        self._reserved: list[dict[str, str]] = []
        self._polled = 0.0

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A stopped trial's controller outlives it for a moment, in which it may reserve room anew."""
        if not self._reserved or time.monotonic() - self._polled < _POLL_SECONDS:
            return
        self._polled = time.monotonic()
        dead = release_groups_of_dead_actors()
        for names in self._reserved:
            if names["placement_group"] in dead:
                release(names)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        is_done, is_pruned = trial.last_result.get("finished"), self._plan.sweep.asha is not None
        self._end(trial, "finished" if is_done else "stopped" if is_pruned else None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, "failed")

    def _end(self, trial: Trial, ended: str | None) -> None:
        candidate = trial.config.get("setting", trial.config)
        name = outcome(self._plan, candidate, self._trunk).trial
        note = write_note(self._plan, candidate, ended=ended)
        if ended == "failed" and note["message"] is None:
            note = write_note(self._plan, candidate, message="its process died")
        if ended == "stopped":
            self._reserved += reservations((RunFolder(self._plan.folder) / name).events())
        measure = self._plan.measure
        value = trial.last_result.get(measure.key) if trial.last_result else None
        told = note["message"] or (f"no {measure.title} yet" if value is None else f"{measure.title} {measure.told(value)}")
        self._done += 1
        logger.info("trial %d: %s %s, %s", self._done, name, ended or "interrupted", told)
