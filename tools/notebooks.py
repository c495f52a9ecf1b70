"""Execute and normalize the book's notebooks; check them; turn percent scripts into notebooks.

    python tools/notebooks.py book/*/*.ipynb                 run and store, in place
    python tools/notebooks.py --check book/*/*.ipynb         say what is wrong, change nothing
    python tools/notebooks.py --no-execute book/*/*.ipynb    normalize only (after an edit of the prose)
    python tools/notebooks.py from-py chapter.py book/steps/chapter.ipynb
    python tools/notebooks.py to-py book/steps/chapter.ipynb chapter.py

With no notebook named, all notebooks of the book. A second run changes no byte: where a fresh run says
what is stored, up to last digits, the stored outputs stay; `--fresh` stores the new ones regardless.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError

from notebook_checks import problems
from notebook_form import FINGERPRINT, ROOT, code_fingerprint, dumps, normalize, outputs_fingerprint
from notebook_run import execute, same_results
from percent import from_percent, to_percent


def book_notebooks() -> list[Path]:
    """Every notebook of the book, in a fixed order; none that a build left behind."""
    found = (ROOT / "book").rglob("*.ipynb")
    return sorted(path for path in found if not {"_build", ".ipynb_checkpoints"} & set(path.parts))


def run_file(path: Path, *, fresh: bool = False) -> bool:
    """Execute the notebook at `path` and store it in normal form; True where a byte changed."""
    before = path.read_text(encoding="utf-8")
    stored = nbformat.reads(before, as_version=4)
    ready = normalize(stored, executed=False)  # the Colab cell is in place before the run
    result = normalize(execute(ready, path.parent), executed=True)
    untouched = stored.metadata.get(FINGERPRINT) == {
        "code": code_fingerprint(stored),
        "outputs": outputs_fingerprint(stored),
    }
    if untouched and not fresh and same_results(stored, result):
        result = normalize(stored, executed=True)
    return _write(path, before, dumps(result))


def normalize_file(path: Path) -> bool:
    """Store the notebook at `path` in normal form without running it; True where a byte changed.

    A notebook whose outputs are those of its code (its fingerprint says so) stays so; any other keeps
    its old fingerprint, and stays red until it is run.
    """
    before = path.read_text(encoding="utf-8")
    stored = nbformat.reads(before, as_version=4)
    current = {"code": code_fingerprint(stored), "outputs": outputs_fingerprint(stored)}
    valid = stored.metadata.get(FINGERPRINT) == current
    return _write(path, before, dumps(normalize(stored, executed=valid)))


def check_file(path: Path) -> list[str]:
    """What is wrong with the notebook at `path`; empty for a good one."""
    return problems(path.read_text(encoding="utf-8"), path.parent)


def _write(path: Path, before: str, after: str) -> bool:
    if before == after:
        return False
    partial = path.with_suffix(".ipynb.partial")
    partial.write_text(after, encoding="utf-8", newline="\n")
    partial.replace(path)
    return True


def _from_py(script: Path, target: Path) -> None:
    notebook = from_percent(script.read_text(encoding="utf-8"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(dumps(normalize(notebook, executed=False)), encoding="utf-8", newline="\n")


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, help="notebooks; with from-py and to-py: source target"
    )
    parser.add_argument("--check", action="store_true", help="report what is wrong; exit 1 if anything is")
    parser.add_argument(
        "--execute", action=argparse.BooleanOptionalAction, default=True, help="run the cells"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="store new outputs even where the old ones agree"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where a check or a cell fails."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words and words[0] in ("from-py", "to-py") else ""
    options = _arguments(words)
    paths: list[Path] = options.paths
    if command and len(paths) != 2:
        raise SystemExit(f"{command} takes a source and a target, not {len(paths)} paths")
    if command == "to-py":
        paths[1].write_text(to_percent(nbformat.read(paths[0], as_version=4)), encoding="utf-8")
        return 0
    if command == "from-py":
        _from_py(*paths)
        paths = paths[1:]
    failed = 0
    for path in paths or book_notebooks():
        failed += not _do(path, options)
    return 1 if failed else 0


def _do(path: Path, options: argparse.Namespace) -> bool:
    start = time.perf_counter()
    if not options.check:
        try:
            changed = run_file(path, fresh=options.fresh) if options.execute else normalize_file(path)
        except CellExecutionError as error:
            print(f"{path}: a cell failed\n{error}", file=sys.stderr)
            return False
        print(f"{path}: {'stored' if changed else 'unchanged'}, {time.perf_counter() - start:.1f} s")
        if not options.execute:
            return True
    found = check_file(path)
    for problem in found:
        print(f"{path}: {problem}", file=sys.stderr)
    return not found


if __name__ == "__main__":
    raise SystemExit(main())
