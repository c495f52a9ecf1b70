"""What the site needs beyond its settings: fewer scripts, and docstrings that read as plain text."""

import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Leave out sphinx-thebe, which is loaded twice, throws an error, and would fetch from off-site."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in str(getattr(script, "filename", script))
        and "thebe" not in str(getattr(script, "attributes", {}).get("body", ""))
    ]


def plain_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Read a docstring as plain text with `code`: no other character in it is markup."""
    if lines and lines[0].startswith("Alias for field number"):  # what Python says of a NamedTuple's field
        lines.clear()
    lines[:] = _plain(lines)


def _plain(lines: list[str]) -> Iterator[str]:
    in_example = False
    for line in lines:
        starts = line.lstrip().startswith(">>>")
        in_example = starts or (in_example and bool(line.strip()))
        yield line if in_example else _escape(line)


def _escape(line: str) -> str:
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part.strip('`')}``"
        else:
            escaped = re.sub(r"([*|_\\])", r"\\\1", part)
            glued = i > 0 and part[:1].isalnum()  # `token`s: markup ends only before white space or a mark
            parts[i] = ("\\ " if glued else "") + escaped
    return "".join(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the handlers; called by Sphinx."""
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("autodoc-process-docstring", plain_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
