"""Running a notebook the way the book's checks do, and keeping what did not change."""

import copy
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from notebook_form import code_fingerprint, is_ignored
from numeric_text import agree

# One thread, so that stored results do not depend on how many cores the author had; no progress bars,
# since they are not results.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "TOKENIZERS_PARALLELISM": "false",
}
CELL_SECONDS = 600


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run every cell in order, in a fresh kernel of this Python, in the notebook's own folder.

    Returns a copy with the new outputs; the first error raises nbclient's CellExecutionError.
    """
    os.environ.update(KERNEL_ENVIRONMENT)
    fresh = copy.deepcopy(notebook)
    client = NotebookClient(
        fresh,
        kernel_name="python3",
        timeout=CELL_SECONDS,
        record_timing=False,
        extra_arguments=["--Application.log_level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return nbformat.from_dict(fresh)


def same_results(stored: NotebookNode, fresh: NotebookNode) -> bool:
    """Whether a fresh run says what the stored outputs say, up to last digits, pictures by their text.

    Cells tagged nbval-ignore-output are not compared. Where this holds, the stored notebook is kept as
    it is, so that running the script twice changes no byte, here or on another machine.
    """
    if code_fingerprint(stored) != code_fingerprint(fresh):
        return False
    pairs = zip(_code_cells(stored), _code_cells(fresh), strict=True)
    return all(_same_outputs(one, other) for one, other in pairs if not is_ignored(other))


def _code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _same_outputs(one: NotebookNode, other: NotebookNode) -> bool:
    if len(one.outputs) != len(other.outputs):
        return False
    pairs = zip(map(_texts, one.outputs), map(_texts, other.outputs), strict=True)
    return all(
        first.keys() == second.keys() and all(agree(first[key], second[key]) for key in first)
        for first, second in pairs
    )


def _texts(output: NotebookNode) -> dict[str, str]:
    """The comparable parts of an output: its text by kind; a picture counts as present or absent."""
    if output.output_type == "stream":
        return {output.name: output.text}
    data = output.get("data", {})
    return {mime: "" if mime.startswith("image/") else str(text) for mime, text in data.items()}
