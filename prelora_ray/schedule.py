"""The schedule of phases that settings describe, and what it decides over a record: for run, fork and replay alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prelora_ray.config import MethodSettings
from prelora_ray.errors import UserError
from prelora_ray.method.architecture import Target
from prelora_ray.method.convergence import ConvergenceTest, Verdict
from prelora_ray.method.phases import Phase, PhaseSchedule
from prelora_ray.method.ranks import assign_ranks, check_ranks, match_rank_pattern
from prelora_ray.records import NormsLine


def phase_schedule(method: MethodSettings, ramp_epochs: int, names: Sequence[str]) -> PhaseSchedule:
    """`ramp_epochs`: of the learning rate, before which no verdict is taken. `names`: of the target modules."""

    def assign(change: dict[str, float]) -> dict[str, int]:
        return ranks_for(method, change, names)

    test = convergence_test(method, ramp_epochs)
    return PhaseSchedule(test, assign, method.warmup_epochs, method.switch_epoch, method.enabled)


def convergence_test(method: MethodSettings, ramp_epochs: int) -> ConvergenceTest:
    return ConvergenceTest(method.tau, method.zeta, method.windows, method.window_epochs, method.norm_statistic, ramp_epochs)


def ranks_for(method: MethodSettings, change: dict[str, float], names: Sequence[str]) -> dict[str, int]:
    """Rank by module name, where the modules' norms changed by so many percent over the last step.

    Raises UserError where `rank_pattern` does not fit the modules.
    """
    if method.rank_pattern is not None:
        try:
            return match_rank_pattern(method.rank_pattern, names)
        except ValueError as error:
            raise UserError(f"method.rank_pattern: {error}") from None
    return assign_ranks(change, method.r_min, method.r_max, method.normalize, method.rank_floor_percent)


def largest_ranks(method: MethodSettings, targets: Sequence[Target]) -> dict[str, int]:
    """Rank by module name: the given one, or the largest that the rule gives.

    Raises UserError where these do not fit the modules.
    """
    names = [target.name for target in targets]
    if method.rank_pattern is None:
        if method.enabled and method.r_max > (smallest := min(target.max_rank for target in targets)):
            raise UserError(
                f"method.r_max = {method.r_max} is not allowed: the model's smallest weight has rank {smallest} at most"
            )
        return dict.fromkeys(names, method.r_max)
    try:
        ranks = match_rank_pattern(method.rank_pattern, names)
        check_ranks(ranks, targets)
    except ValueError as error:
        raise UserError(f"method.rank_pattern: {error}") from None
    return ranks


def decide(schedule: PhaseSchedule, epochs: Iterable[NormsLine]) -> list[Verdict]:
    """Takes the schedule over lines of norms.jsonl, up to the one with which the run leaves phase full; returns the
    test's verdicts."""
    verdicts = []
    for line in epochs:
        if (verdict := schedule.end_epoch(line.epoch, line.norms, line.loss).verdict) is not None:
            verdicts.append(verdict)
        if schedule.phase is not Phase.FULL:
            break
    return verdicts
