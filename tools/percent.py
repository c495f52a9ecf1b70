"""Percent scripts and notebooks: `# %%` starts a code cell, `# %% [markdown]` a Markdown cell.

For writing a chapter in an editor. The notebook is the source of truth: a script is turned into one
once (or a notebook into a script, to edit it), and no script is kept beside its notebook.
"""

import json
import re

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

MARKER = re.compile(r"^# %%(?P<markdown>[ ]*\[markdown\])?(?:[ ]+tags=(?P<tags>\[.*\]))?[ ]*$")


def from_percent(text: str) -> NotebookNode:
    """The notebook that a percent script describes.

    Markdown is commented out line by line, or stands between two lines of three double quotes.
    Raises ValueError for a marker that cannot be read, quoting it, and for code before the first one.

    >>> [cell.cell_type for cell in from_percent("# %% [markdown]\\n# # Title\\n# %%\\nx = 1").cells]
    ['markdown', 'code']
    """
    cells: list[NotebookNode] = []
    body: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("# %%"):
            match = MARKER.match(line)
            if match is None:
                raise ValueError(f"line {number}: {line!r} is not '# %%', '# %% [markdown]' or tags=[\"…\"]")
            new = new_markdown_cell if match["markdown"] else new_code_cell
            tags = json.loads(match["tags"] or "[]")
            cells.append(new(metadata={"tags": tags} if tags else {}))
            body = []
        elif not cells:
            if line.strip() and not line.startswith("#"):
                raise ValueError(f"line {number}: {line!r} comes before the first '# %%'")
            continue
        else:
            body.append(line)
        cells[-1].source = "\n".join(body).strip("\n")
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = _uncomment(cell.source)
    return new_notebook(cells=cells)


def to_percent(notebook: NotebookNode) -> str:
    """The percent script of a notebook; its outputs are left out."""
    parts = []
    for cell in notebook.cells:
        kind = " [markdown]" if cell.cell_type == "markdown" else ""
        tags = cell.metadata.get("tags", [])
        marker = f"# %%{kind}" + (f" tags={json.dumps(tags)}" if tags else "")
        parts.append(marker + "\n" + (_comment(cell.source) if kind else cell.source))
    return "\n\n".join(parts) + "\n"


def _comment(source: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in source.split("\n"))


def _uncomment(source: str) -> str:
    quoted = re.fullmatch(r'r?"""\n?(.*?)\n?"""', source.strip(), flags=re.DOTALL)
    if quoted:
        return quoted.group(1)
    return "\n".join(re.sub(r"^# ?", "", line) for line in source.split("\n"))
