"""The site that `make docs` builds of these pages and of the public functions' docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import prelora_ray

project = "prelora_ray"
version = release = prelora_ray.__version__
html_title = f"prelora_ray {version}"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"  # brings all it shows: the site needs no network
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other libraries, of which no index is fetched
myst_heading_anchors = 4
autodoc_typehints_format = "short"
autoclass_content = "both"
autodoc_member_order = "bysource"
default_role = "code"
add_module_names = False


def _begin_with_readme(app: Any, page: str, source: list[str]) -> None:
    """The front page is README.md, whose links are from the folder above."""
    if page == "index":
        readme = Path(app.srcdir).parent / "README.md"
        app.env.note_dependency(str(readme))
        links = re.sub(r"\]\((?!https?:|#)", "](../", readme.read_text())
        source[0] = links.replace("](../docs/", "](") + source[0]


def _as_restructured_text(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: with `code` between single backticks, and blocks of code indented by four spaces."""
    converted: list[str] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("    ") and not before.strip() and not (converted and converted[-1].startswith("    ")):
            converted += [".. code-block:: python", ""]
        converted.append(line if line.startswith("    ") else re.sub(r"`([^`]+)`", r"``\1``", line))
    lines[:] = converted


def setup(app: Any) -> None:
    app.connect("source-read", _begin_with_readme)
    app.connect("autodoc-process-docstring", _as_restructured_text)
