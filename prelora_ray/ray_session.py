"""Ray for the time of a command."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from prelora_ray.errors import UserError, one_line
from prelora_ray.fault_tolerance.ray_private import JobConfig, in_process_groups_of_their_own, keep_token_private


@contextmanager
def ray_session(*, debug: bool = False) -> Iterator[bool]:
    """Ray for the time of the block: the cluster that RAY_ADDRESS names, as under `ray job submit`, or an embedded one.

    Yields whether it is an embedded one, which will never have more CPUs or GPUs than this machine. Raises UserError
    for an invalid address.
    """
    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    keep_token_private()
    try:
        with in_process_groups_of_their_own():
            ray.init(
                address=address,
                job_config=JobConfig(),
                log_to_driver=debug,
                logging_level=logging.INFO if debug else logging.ERROR,
                **({"include_dashboard": False} if address == "local" else {}),
            )
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS = {address!r} is not allowed: {one_line(error)}") from None
    keep_token_private()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray's own messages go: standard output is for results
            yield address == "local"
    finally:
        ray.shutdown()
