"""What is not installed with the package itself, but with an extra of it: `pip install 'prelora-ray[report]'`."""

from __future__ import annotations

from importlib.util import find_spec

from prelora_ray.errors import UserError


def check_installed(what: str, extra: str, *modules: str) -> None:
    """Raises UserError where `what`, such as a command, needs a module that is not there.

    `extra` is the one of pyproject.toml that brings all these modules, or several: `onnx,peft`.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'prelora-ray[{extra}]'")
