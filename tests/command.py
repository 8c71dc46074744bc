"""The command `prelora`, as a user calls it."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from prelora_ray.cli import main

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "prelora_ray"]
_WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from prelora_ray.cli import main
main()
"""


def prelora(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


def prelora_without(modules: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own that cannot import some modules: `plotly,kaleido`."""
    command = [sys.executable, "-c", _WITHOUT, modules, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


def prelora_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In this process, which has imported what takes seconds: for what ends before Ray starts."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["prelora", *arguments]),
        _no_log_handlers(),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _no_log_handlers() -> Iterator[None]:
    """The test runner's are out of the way for the time of the block, so that the command installs its own."""
    root, level = logging.getLogger(), logging.getLogger("prelora_ray").level
    handlers = root.handlers
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        logging.getLogger("prelora_ray").setLevel(level)
