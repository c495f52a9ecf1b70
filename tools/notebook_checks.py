"""What must be true of a stored notebook, checked without running it."""

import itertools
import json
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from notebook_form import (
    FINGERPRINT,
    SOLUTION,
    alt_text,
    code_fingerprint,
    colab_source,
    dumps,
    is_colab,
    normalize,
    outputs_fingerprint,
)

LINE_LENGTH = 100
SECTIONS = ("Summary", "Where to read more", "Exercises")
NOT_PORTABLE = {
    r"^\s*(?:`{3,}|~{3,}|:{3,})\s*\{": "a MyST directive",
    r"^\s*:{3,}": "a colon fence",
    r"\{[a-z][\w:.+-]*\}`": "a MyST role",
    r"^\([\w-]+\)=\s*$": "a MyST label",
    r"^\+\+\+": "a MyST block break",
    r"\$\$\s*\([\w:-]+\)\s*$": "a labelled equation",
    r"\$[^$`]*\\\\[a-zA-Z]{2}[^$`]*\$": "a doubled backslash in a formula",
    r"\[\^[^\]]+\]": "a footnote, which Colab does not show",
    r"\]\((?!https?:)[^)\s]+\.(?:png|svg|jpe?g|gif)\)": "a local picture, which Colab does not show",
}
LOCAL_PATH = re.compile(
    r"(?<![\w./:])/(?:home|root|Users|tmp|private|var|work|usr|opt|mnt)/|[A-Z]:\\\\?Users"
)
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(?:#[^)\s]*)?\)")
IMAGE_ALT = re.compile(r"!\[\s*\]\(")


def problems(text: str, folder: Path | None = None) -> list[str]:
    """Everything that is wrong with the stored notebook `text`; empty for a good one.

    `folder` is where the notebook lies, so that links to its neighbors can be checked.
    """
    try:
        ids = [cell.get("id") for cell in json.loads(text)["cells"]]
        if len(set(ids)) != len(ids):
            return ["cell ids are not unique"]
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds; each means that this is no notebook
        return [f"not a valid notebook: {error}"]
    found = [
        *_stale(notebook),
        *_execution(notebook),
        *_headings(notebook),
        *_exercises(notebook),
        *_portable(notebook, folder),
        *_code_and_outputs(notebook),
    ]
    return found or _form(notebook, text)


def _stale(notebook: NotebookNode) -> list[str]:
    stored = notebook.metadata.get(FINGERPRINT)
    if stored is None:
        return ["no fingerprint: run tools/notebooks.py on it"]
    found = []
    if stored.get("code") != code_fingerprint(notebook):
        found.append("the code was changed after it was run")
    if stored.get("outputs") != outputs_fingerprint(notebook):
        found.append("the outputs were changed or stripped after the run")
    return found


def _form(notebook: NotebookNode, text: str) -> list[str]:
    try:
        normal = dumps(normalize(notebook, executed=False))
    except ValueError as error:
        return [str(error)]
    return [] if normal == text else ["not in its stored form: run tools/notebooks.py on it"]


def _execution(notebook: NotebookNode) -> list[str]:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are {counts}, not 1..{len(code)}")
    if not code or code[0].source != colab_source(cell.source for cell in code):
        found.append("the first code cell is not the Colab cell of the template")
    if sum(is_colab(cell) for cell in code) > 1:
        found.append("more than one Colab cell")
    return found


def _headings(notebook: NotebookNode) -> list[str]:
    headings = _all_headings(notebook)
    found = []
    if not headings or headings[0][0] != 1 or notebook.cells[0].cell_type != "markdown":
        found.append("the first cell does not begin with the title (# …)")
    if sum(level == 1 for level, _ in headings) != 1:
        found.append("there must be exactly one title (# …)")
    jumps = [(a, b) for a, b in itertools.pairwise(headings) if b[0] > a[0] + 1]
    found += [f"heading {b[1]!r} skips a level below {a[1]!r}" for a, b in jumps]
    last = tuple(title for level, title in headings if level == 2)[-len(SECTIONS) :]
    if last != SECTIONS:
        found.append(f"the last sections are {last}, not {SECTIONS}")
    return found


def _all_headings(notebook: NotebookNode) -> list[tuple[int, str]]:
    headings = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = _without_fences(cell.source)
            headings += [
                (len(marks), title.strip()) for marks, title in re.findall(r"(?m)^(#+) (.+)$", prose)
            ]
    return headings


def _exercises(notebook: NotebookNode) -> list[str]:
    """Each `### Exercise n` is followed by one executed, folded solution cell that asserts something."""
    found = []
    exercises: list[int] = []
    solved: list[int] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            exercises += [int(n) for n in re.findall(r"(?m)^### Exercise (\d+)\b", cell.source)]
        elif match := SOLUTION.match(cell.source):
            solved.append(int(match.group(1)))
            if "assert " not in cell.source:
                found.append(f"the solution to exercise {solved[-1]} asserts nothing")
            if solved[-1:] != exercises[-1:]:
                found.append(f"the solution to exercise {solved[-1]} does not follow its exercise")
    if exercises != list(range(1, len(exercises) + 1)) or len(exercises) < 3:
        found.append(f"exercises are numbered {exercises}; wanted are '### Exercise 1' … and three at least")
    if sorted(set(solved)) != exercises:
        found.append(f"exercises {exercises} have solution cells {solved}")
    return found


def _portable(notebook: NotebookNode, folder: Path | None) -> list[str]:
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        fenced = re.findall(r"(?m)^\s*(?:`{3,}|~{3,})\s*\{.*$", cell.source)
        found += [f"{cell.id}: a MyST directive: {line.strip()!r}" for line in fenced]
        prose = _without_fences(cell.source)
        for pattern, name in NOT_PORTABLE.items():
            if match := re.search(pattern, prose, flags=re.MULTILINE):
                found.append(f"{cell.id}: {name}: {match.group(0)!r}")
        if IMAGE_ALT.search(prose):
            found.append(f"{cell.id}: a picture without alt text")
        if cell.get("attachments"):
            found.append(f"{cell.id}: attachments are not portable")
        if folder is not None:
            targets = LINK.findall(prose)
            found += [f"{cell.id}: link to missing {t!r}" for t in targets if not (folder / t).exists()]
    return found


def _without_fences(source: str) -> str:
    return re.sub(r"(?ms)^(\s*)(```+|~~~+)[^{\n]*\n.*?^\s*\2\s*$", "", source)


def _code_and_outputs(notebook: NotebookNode) -> list[str]:
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        too_long = [line for line in cell.source.split("\n") if len(line) > LINE_LENGTH]
        found += [f"{cell.id}: a line of {len(line)} characters: {line[:40]!r}…" for line in too_long]
        if LOCAL_PATH.search(cell.source):
            found.append(f"{cell.id}: the code holds a local path")
        for output in cell.outputs:
            found += [f"{cell.id}: {what}" for what in _output(output)]
        pictures = [o for o in cell.outputs if any(m.startswith("image/") for m in o.get("data", {}))]
        if len(pictures) > 1:
            found.append(f"{cell.id}: {len(pictures)} pictures in one cell; one idea a cell, one picture")
    return found


def _output(output: NotebookNode) -> list[str]:
    if output.output_type == "error":
        return [f"an error output: {output.ename}: {output.evalue}"]
    if output.output_type == "stream":
        found = [f"output on stderr: {output.text[:80]!r}"] if output.name == "stderr" else []
        texts = [output.text]
    else:
        pictures = [mime for mime in output.data if mime.startswith("image/")]
        found = (
            ["a picture without alt text: use lmtutorial.plots.show"]
            if pictures and not alt_text(output)
            else []
        )
        texts = [text for mime, text in output.data.items() if mime.startswith("text/")]
    for text in texts:
        if match := LOCAL_PATH.search(text):
            found.append(f"a local path in the output: {match.group(0)!r}")
        if match := ADDRESS.search(text):
            found.append(f"a memory address in the output: {match.group(0)!r}")
    return found
