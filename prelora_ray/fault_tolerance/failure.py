"""Why an attempt failed, in one line, and whether another one would fail alike."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray.exceptions
import torch
import torch.distributed as dist

from prelora_ray.data.damage import DamagedDataError
from prelora_ray.errors import UserError, one_line

_OWN = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
"""What code that is wrong, or is given what it cannot take, raises."""
_SURROUNDINGS = (dist.DistError, torch.AcceleratorError, torch.OutOfMemoryError)
"""Those of them that tell of lost peers, broken devices or full memory; for others, words that do."""
_SURROUNDINGS_SAY = re.compile(
    "gloo|nccl|cuda error|connection|timed out|timeout|out of memory|allocate memory|new thread|no space left", re.IGNORECASE
)
_WRAPPED_AS = ("cause", "controller_failure", "health_check_failure", "_base_exc")
"""Attributes in which Ray's errors hold the one that they tell of."""
_TRACEBACK = "Traceback (most recent call last)"
_LONGEST = 500


class WorkerCodeError(Exception):
    """What a worker's own code raised."""

    def __init__(self, reason: str, step: int | None, *, is_final: bool = False, is_repeated: bool = False) -> None:
        """`reason`: the error in one line. `step`: optimizer steps done, None at the worker's start.

        `is_final`: whether any other attempt would end alike. `is_repeated`: whether the attempt before has.
        """
        super().__init__(reason)
        self.reason = reason
        self.step = step
        self.is_final = is_final
        self.is_repeated = is_repeated

    def __reduce__(self) -> tuple[Callable[..., WorkerCodeError], tuple[object, ...]]:
        return _restored, (self.reason, self.step, self.is_final, self.is_repeated)

    def repeats(self, other: WorkerCodeError) -> bool:
        """Whether it is the failure of an earlier attempt, with no step done beyond that."""
        return self.reason == other.reason and (self.step or 0) <= (other.step or 0)


def _restored(reason: str, step: int | None, is_final: bool, is_repeated: bool) -> WorkerCodeError:
    return WorkerCodeError(reason, step, is_final=is_final, is_repeated=is_repeated)


@contextmanager
def own_failures(step: Callable[[], int | None]) -> Iterator[None]:
    """Raises WorkerCodeError in place of errors of the code inside; those of its surroundings stay as they are.

    Final are a UserError, a mistake in the settings that was found late, and damaged data, the same at every attempt.
    """
    try:
        yield
    except Exception as error:
        is_final = isinstance(error, (UserError, DamagedDataError))
        if not is_final and not is_own(error):
            raise
        raise WorkerCodeError(one_line(error) if is_final else root_cause(error), step(), is_final=is_final) from error


def failures_of(error: BaseException) -> list[WorkerCodeError]:
    """The workers' own failures that ended an attempt; none where a lost worker or node explains the others."""
    found = list(getattr(error, "worker_failures", {}).values())
    if any(isinstance(_unwrapped(failure), ray.exceptions.RayActorError) for failure in found):
        return []
    return [failure for failure in found if isinstance(failure, WorkerCodeError)]


def is_own(error: BaseException) -> bool:
    """Whether the code itself is at fault, as far as that can be told; in doubt it is not."""
    cause, line = _unwrapped(error), root_cause(error)
    kind: Any = type(cause)
    if isinstance(cause, ray.exceptions.UserCodeException):  # Ray Data's, in which the error is left as a name alone
        kind = getattr(builtins, line.split(":")[0], None)
    is_code = isinstance(kind, type) and issubclass(kind, _OWN) and not issubclass(kind, _SURROUNDINGS)
    return is_code and not _SURROUNDINGS_SAY.search(line)


def root_cause(error: BaseException) -> str:
    """The error that others were raised for, in one line: `RuntimeError: ...`."""
    if failures := getattr(error, "worker_failures", None):
        error = min(failures.values(), key=_rank)
    cause = _unwrapped(error)
    if isinstance(cause, WorkerCodeError):
        return cause.reason
    if isinstance(cause, ray.exceptions.UserCodeException):  # whose own cause did not travel with it
        return _first_raised(str(error))
    return _first_raised(str(cause)) if _TRACEBACK in str(cause) else _short(f"{type(cause).__name__}: {cause}")


def _rank(failure: BaseException) -> int:
    """The smaller, the closer to the cause: of several workers' failures, the others lost a peer by it."""
    if isinstance(failure, WorkerCodeError):
        return 0
    return 1 if isinstance(_unwrapped(failure), ray.exceptions.RayActorError) else 2


def _unwrapped(error: BaseException) -> BaseException:
    while True:
        inner = next((e for name in _WRAPPED_AS if isinstance(e := getattr(error, name, None), BaseException)), None)
        if inner is None:
            return error
        error = inner


def _first_raised(traceback: str) -> str:
    """What a traceback's first error says: the lines behind its last frame, which are not indented."""
    lines = re.split(r"\n\n(?:The above exception|During handling)", traceback)[0].rstrip().split("\n")
    frames = [i for i, line in enumerate(lines[:-1]) if line.startswith(" ")]
    return _short("\n".join(lines[frames[-1] + 1 if frames else 0 :]))


def _short(message: str) -> str:
    return " ".join(message.split())[:_LONGEST]
