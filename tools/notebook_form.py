"""The one form in which the book's notebooks are stored: ids, metadata, outputs, fingerprint.

`normalize` is pure and idempotent: the same notebook in gives the same bytes out, so that a diff
shows what an author changed and nothing else.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
FINGERPRINT = "lmtutorial"
VIEW_TAGS = ("hide-cell", "hide-input", "hide-output", "remove-cell", "remove-input")
KEPT_TAGS = frozenset({*VIEW_TAGS, "nbval-ignore-output", "raises-exception", "results"})
KEPT_MIME = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/svg+xml")
SOLUTION = re.compile(r"# Solution to exercise (\d+)\b")
COLAB_MARK = '"google.colab" in sys.modules'
COLAB_TEMPLATE = """\
# On Google Colab only: install the book's package. What Colab already has stays as it is.
import sys

if "google.colab" in sys.modules:
    %pip install -q "lmtutorial{extras} @ git+{repository}"
"""
EXTRAS = {"gguf": re.compile(r"""\bgguf\b|\bgguf_file\b|["']smollm2-135m["']""")}
"""The package's extras that a chapter installs on Colab, by what its code mentions."""


def repository() -> str:
    """The repository's address, from its one source: pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"])


def colab_source(sources: Iterable[str]) -> str:
    """The first code cell of the notebook whose code cells have these sources."""
    code = "\n".join(source for source in sources if COLAB_MARK not in source)
    needed = ",".join(extra for extra, mention in EXTRAS.items() if mention.search(code))
    return COLAB_TEMPLATE.format(repository=repository(), extras=f"[{needed}]" if needed else "").rstrip()


def is_colab(cell: NotebookNode) -> bool:
    """Whether this is the cell that installs the package on Colab."""
    return bool(cell.cell_type == "code" and COLAB_MARK in cell.source)


def is_ignored(cell: NotebookNode) -> bool:
    """Whether the output of this cell may change from run to run (timings, long training)."""
    return "nbval-ignore-output" in cell.metadata.get("tags", [])


def code_fingerprint(notebook: NotebookNode) -> str:
    """SHA-256 over the sources of the code cells, without the Colab cell, which the template owns."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not is_colab(cell)]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def outputs_fingerprint(notebook: NotebookNode) -> str:
    """SHA-256 over all stored outputs, pictures included."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def dumps(notebook: NotebookNode) -> str:
    """The notebook as the text that is written to disk."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def normalize(notebook: NotebookNode, *, executed: bool) -> NotebookNode:
    """The notebook in its stored form; `executed` says that its outputs belong to its code.

    Only an executed notebook gets a new fingerprint: one that was not keeps what it had, so code that
    changed without being run stays red. Tags outside `KEPT_TAGS` raise ValueError.
    """
    cells = [_cell(cell) for cell in notebook.cells if cell.source.strip()]
    _put_colab_cell_first(cells)
    count = 0
    for position, cell in enumerate(cells, start=1):
        cell["id"] = f"cell-{position:03d}"
        if cell["cell_type"] == "code" and (executed or cell["execution_count"] is not None):
            count += 1
            cell["execution_count"] = count
            for output in cell["outputs"]:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = count
    metadata: dict[str, Any] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    normal = nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})
    stored = notebook.metadata.get(FINGERPRINT)
    if executed:
        fingerprint = {"code": code_fingerprint(normal), "outputs": outputs_fingerprint(normal)}
        normal.metadata[FINGERPRINT] = nbformat.from_dict(fingerprint)
    elif stored is not None:
        normal.metadata[FINGERPRINT] = nbformat.from_dict(dict(stored))
    nbformat.validate(normal)
    return normal


def _put_colab_cell_first(cells: list[dict[str, Any]]) -> None:
    cells[:] = [cell for cell in cells if COLAB_MARK not in cell["source"] or cell["cell_type"] != "code"]
    first = next((i for i, cell in enumerate(cells) if cell["cell_type"] == "code"), len(cells))
    colab = {
        "cell_type": "code",
        "execution_count": 1 if any(cell.get("execution_count") for cell in cells) else None,
        "metadata": {"tags": ["remove-cell"]},
        "outputs": [],
        "source": colab_source(cell["source"] for cell in cells if cell["cell_type"] == "code"),
    }
    cells.insert(first, colab)


def _cell(cell: NotebookNode) -> dict[str, Any]:
    if cell.cell_type == "raw":
        raise ValueError(f"raw cells are not portable; write Markdown instead of {cell.source[:60]!r}")
    source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
    if cell.cell_type == "markdown":
        return {"cell_type": "markdown", "metadata": _tags(cell), "source": source}
    outputs = _outputs(cell.get("outputs", []))
    return {
        "cell_type": "code",
        "execution_count": cell.get("execution_count"),
        "metadata": _tags(cell) | _site_options(source, outputs),
        "outputs": outputs,
        "source": source,
    }


def _tags(cell: NotebookNode) -> dict[str, Any]:
    tags = set(cell.metadata.get("tags", []))
    if unknown := tags - KEPT_TAGS:
        raise ValueError(f"unknown tags {sorted(unknown)}; allowed are {sorted(KEPT_TAGS)}")
    if cell.cell_type == "code" and SOLUTION.match(cell.source.lstrip()):
        tags.add("hide-cell")
    return {"tags": sorted(tags)} if tags else {}


def _site_options(source: str, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the site (myst-nb) reads from a cell: alt text, the label of a fold, a lexer for sources."""
    options: dict[str, Any] = {}
    if alt := next((text for output in outputs if (text := alt_text(output))), ""):
        options["image"] = {"alt": alt}
    if solution := SOLUTION.match(source):
        options["code_prompt_show"] = f"Show the solution to exercise {solution.group(1)}"
        options["code_prompt_hide"] = f"Hide the solution to exercise {solution.group(1)}"
    if "getsource(" in source:
        options["text_lexer"] = "python"
    return {"mystnb": options} if options else {}


def alt_text(output: dict[str, Any]) -> str:
    """The first line of the text beside a picture, which `lmtutorial.plots.show` makes the alt text.

    matplotlib's own text for a figure ("<Figure size ...>") tells a reader nothing and counts as none.
    """
    data = output.get("data", {})
    if not any(mime.startswith("image/") for mime in data):
        return ""
    text = str(data.get("text/plain", "")).split("\n")[0].strip()
    return "" if text.startswith("<") else text


def _outputs(outputs: list[NotebookNode]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            if merged and merged[-1].get("name") == output["name"]:
                merged[-1]["text"] += output["text"]
            else:
                merged.append({"output_type": "stream", "name": output["name"], "text": output["text"]})
        elif kind in ("display_data", "execute_result"):
            data = {mime: _text(output["data"][mime]) for mime in KEPT_MIME if mime in output["data"]}
            width = output.get("metadata", {}).get("image/png", {}).get("width")
            metadata = {"image/png": {"width": width}} if width else {}
            entry = {"output_type": kind, "data": data, "metadata": metadata}
            merged.append(entry | ({"execution_count": None} if kind == "execute_result" else {}))
        else:
            merged.append(dict(output))
    return merged


def _text(value: Any) -> str:
    return "".join(value) if isinstance(value, list) else str(value).rstrip("\n")
