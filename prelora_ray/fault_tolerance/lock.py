"""One driver to a run folder, on disks, file shares and object stores alike.

Every driver writes a claim: a file of its own, ``driver-<nonce>.json``, which its heartbeat changes. It holds the
folder once a listing made after its claim shows no other living claim. Of two claims one was there before the other's
driver listed, so two never both hold it. Of several that start at once, the one of the lowest name stays; the others
withdraw.

No clock is compared with another machine's. A driver is alive if its process is seen to run, or its claim changes while
this one polls. It is dead once its process is seen to have ended, or its claim has not changed for `SILENCE_SECONDS` of
this process's own clock. A dead driver's claim is removed, and a driver whose claim is gone stops.

This asks one thing of the storage: a listing shows every file that was written before it. Disks, S3 and GCS do that,
and an NFS client lists a directory anew once it has written into it. On a store that does not, only drivers that start
further apart than its listings lag are kept apart. A conditional upload would do without, but pyarrow has none.

One thing no file can prevent: a driver that was suspended, or cut off from the storage, for so long that another took
over may write until it next checks its claim, at most `BEAT_SECONDS` after its return.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prelora_ray.errors import UserError, WorkError
from prelora_ray.run_folder import RunFolder

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
_POLL_SECONDS = {True: 0.2, False: 1.0}
"""Between polls of the others' claims, by whether the run folder is on a disk; a bucket is polled less often."""

CLAIM = "driver"
"""What the names of claims begin with."""
Claim = dict[str, Any]
"""A claim's content, as docs/run-folder.md has it; empty where it is damaged."""


class HeldRunError(UserError):
    """Another driver trains the run."""


class LostRunError(WorkError):
    """Another driver has taken over the run."""


class DriverLock:
    """Holds a run folder for the time of a block.

    Raises HeldRunError where a living driver holds it: at once where that one's process can be seen, else after its
    next heartbeat. Takes over from a dead one: at once, else after `silence_seconds`. Raises LostRunError at the end of
    the block where another driver has taken over.
    """

    def __init__(self, folder: RunFolder, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._folder = folder
        self._silence_seconds = silence_seconds
        self._name = f"{CLAIM}-{uuid.uuid4().hex}.json"
        self._claim: Claim = {**_this_process(), "since": time.time(), "beats": 0}
        self._heard: dict[str, tuple[Claim, float]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> DriverLock:
        try:
            self._get_in()
        except BaseException:
            self._withdraw()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.check()
        self._withdraw()

    @property
    def check(self) -> Callable[[], None]:
        """Raises LostRunError where another driver has taken over. Any process may call it."""
        return functools.partial(_check, self._folder, self._name)

    def _withdraw(self) -> None:
        with contextlib.suppress(OSError):  # storage that cannot be reached: others see the claim fall silent
            self._folder.remove_file(self._name)

    def _get_in(self) -> None:
        while True:
            is_laid, others = self._poll()
            if is_laid and not others:
                break
            if min(others, default=self._name) >= self._name:
                self._write(holds=False)
            elif is_laid:
                self._folder.remove_file(self._name)  # so that the one of the lowest name finds itself alone
            if others:
                time.sleep(_POLL_SECONDS[self._folder.is_local])
        self._write(holds=True)

    def _poll(self) -> tuple[bool, dict[str, Claim]]:
        """Whether the own claim is there, and all others but those of dead drivers, which it removes.

        Raises HeldRunError where a living driver holds the folder.
        """
        start = time.monotonic()
        others = claims(self._folder)
        is_laid = others.pop(self._name, None) is not None
        for name, claim in list(others.items()):
            lives = self._lives(name, claim, start)
            if lives is False:
                self._folder.remove_file(name)
                del others[name]
            elif lives and _holds(claim):
                raise _held(self._folder, claim)
        return is_laid, others

    def _lives(self, name: str, claim: Claim, start: float) -> bool | None:
        """Whether a claim's driver is alive, None if not known yet. `start`: own clock, before the claim was read."""
        is_running = _is_running(claim)
        if is_running is not None:
            return is_running
        if name not in self._heard:
            self._heard[name] = claim, time.monotonic()
            if _holds(claim):
                told = (self._folder, _who(claim), self._silence_seconds)
                logger.info("run %s is held by %s: taking it over in %g s unless that shows a sign of life", *told)
        before, since = self._heard[name]
        if claim != before:
            self._heard[name] = claim, time.monotonic()
            return True
        return False if start - since > self._silence_seconds else None

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # on a full disk the next beat tries again
                others = claims(self._folder)
                is_laid = others.pop(self._name, None) is not None
                if not is_laid or any(_holds(claim) for claim in others.values()):
                    # Two hold it: one was suspended inside a beat, which brought its claim back. Neither goes on.
                    self._folder.remove_file(self._name)
                    return
                self._write(holds=True)

    def _write(self, *, holds: bool) -> None:
        self._claim["beats"] += 1
        self._folder.write_json(self._name, {**self._claim, "holds": holds, "time": time.time()})


def claims(folder: RunFolder) -> dict[str, Claim]:
    """All drivers' claims to a run folder, by file name."""
    found = {}
    for name in folder.list_files():
        if not (name.startswith(CLAIM) and name.endswith(".json")):  # earlier versions had one `driver.json`
            continue
        try:
            claim = folder.read_json(name)
        except ValueError:
            claim = {}
        except OSError:
            if folder.exists(name):
                raise
            continue  # its driver has ended meanwhile
        found[name] = claim if isinstance(claim, dict) else {}
    return found


def holder(folder: RunFolder) -> Claim | None:
    """The claim of the driver that holds a run folder; None where none does."""
    return next((claim for claim in claims(folder).values() if _holds(claim)), None)


def is_held(folder: RunFolder) -> bool:
    """Whether a living driver seems to hold a run folder: one on another machine by its claim's age on our clock."""
    claim = holder(folder)
    return claim is not None and _seems_alive(claim)


def check_free(folder: RunFolder) -> None:
    """Raises HeldRunError where a living driver seems to hold a run folder. Unlike DriverLock it writes nothing."""
    claim = holder(folder)
    if claim is not None and _seems_alive(claim):
        raise _held(folder, claim)


def _seems_alive(claim: Claim) -> bool:
    is_running = _is_running(claim)
    return time.time() - claim.get("time", 0.0) < SILENCE_SECONDS if is_running is None else is_running


def _held(folder: RunFolder, claim: Claim) -> HeldRunError:
    return HeldRunError(f"run {folder} is being trained by {_who(claim)}: wait for it, stop it, or give another --name")


def _check(folder: RunFolder, name: str) -> None:
    with contextlib.suppress(OSError):  # storage that cannot be reached tells nothing
        if folder.exists(name):
            return
        other = holder(folder)
        who = f", {_who(other)}," if other else ""
        raise LostRunError(f"another driver{who} has taken over run {folder}, as it had no sign of life from this one")


def _holds(claim: Claim) -> bool:
    """Whether a claim's driver holds the folder; where it does not say, it does."""
    return bool(claim.get("holds", True))


def _who(claim: Claim) -> str:
    return f"process {claim.get('pid')} on {claim.get('host')}"


def _this_process() -> Claim:
    """What tells this process from all others; `started` is in clock ticks since the boot."""
    boot = namespace = None
    with contextlib.suppress(OSError):  # not on Linux: then others' processes cannot be seen
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if os.readlink("/proc/self") == str(os.getpid()):  # a /proc of this namespace
            namespace = os.readlink("/proc/self/ns/pid")
    state = _state(os.getpid())
    return {
        **{"host": socket.gethostname(), "boot": boot, "pid_namespace": namespace},
        **{"pid": os.getpid(), "started": state and state[1]},
    }


def _is_running(claim: Claim) -> bool | None:
    """Whether a claim's process runs; None where this one cannot see it."""
    here = _this_process()
    if here["pid_namespace"] is None or any(claim.get(key) != here[key] for key in ("host", "boot", "pid_namespace")):
        return None
    try:
        os.kill(claim["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    state = _state(claim["pid"])
    return None if state is None else state[0] != "Z" and state[1] == claim["started"]


def _state(pid: int) -> tuple[str, int] | None:
    """A process's state, `Z` once it has ended, and when it was started; None where that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])
