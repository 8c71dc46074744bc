"""File systems that are full, or that do not answer."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """A small file system of which a test takes all the room, also what others free meanwhile, and gives it back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fillers = path / "fillers"
        self._is_over = threading.Event()
        self._thread = threading.Thread()

    def fill(self, *, inodes: bool = False) -> None:
        """Returns when nothing has room any more; with `inodes`, not even an empty file, as on some file systems."""
        self._fillers.mkdir(exist_ok=True)
        self._take(inodes)
        self._is_over.clear()
        self._thread = threading.Thread(target=self._keep, args=(inodes,), daemon=True)
        self._thread.start()

    def free(self) -> None:
        self._is_over.set()
        self._thread.join()
        shutil.rmtree(self._fillers)

    def _keep(self, inodes: bool) -> None:
        while not self._is_over.wait(0.002):
            self._take(inodes)

    def _take(self, inodes: bool) -> None:
        with contextlib.suppress(OSError), open(self._fillers / "bytes", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with contextlib.suppress(OSError):
            while inodes:
                (self._fillers / str(len(list(self._fillers.iterdir())))).touch()


class HangingDisk:
    """A small file system on which, while it hangs, whoever writes waits, as on a share whose server is silent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_hanging = False

    @contextlib.contextmanager
    def hangs(self) -> Iterator[None]:
        """For the time of a block, and no longer than 20 s: else a test whose own thread waits would do so for ever."""
        subprocess.run(["fsfreeze", "--freeze", str(self.path)], check=True)
        self.is_hanging = True
        guard = threading.Timer(20.0, self._thaw)
        guard.start()
        try:
            yield
        finally:
            guard.cancel()
            self._thaw()

    def _thaw(self) -> None:
        self.is_hanging = False
        subprocess.run(["fsfreeze", "--unfreeze", str(self.path)], capture_output=True, check=False)
