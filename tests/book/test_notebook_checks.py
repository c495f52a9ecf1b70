"""A stale or broken notebook is red: each way of breaking one is done here to a good one."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import notebooks
from notebook_checks import problems

Notebook = dict[str, Any]


def cell(notebook: Notebook, fragment: str) -> dict[str, Any]:
    return next(c for c in notebook["cells"] if fragment in "".join(c["source"]))


def edited(text: str, edit: Callable[[Notebook], object]) -> str:
    notebook = json.loads(text)
    edit(notebook)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def strip_outputs(notebook: Notebook) -> None:
    for c in notebook["cells"]:
        if c["cell_type"] == "code":
            c["outputs"] = []


def change_picture(notebook: Notebook) -> None:
    data = cell(notebook, "show(figure")["outputs"][0]["data"]
    png = bytearray(base64.b64decode(data["image/png"]))
    png[-20] ^= 1
    data["image/png"] = base64.b64encode(png).decode()


def remove_alt(notebook: Notebook) -> None:
    cell(notebook, "show(figure")["outputs"][0]["data"]["text/plain"] = "<Figure size 640x390 with 1 Axes>"


def add_text(text: str) -> Callable[[Notebook], None]:
    def edit(notebook: Notebook) -> None:
        source = cell(notebook, "## The sum")["source"]
        cell(notebook, "## The sum")["source"] = "".join(source) + "\n\n" + text

    return edit


def set_source(fragment: str, new: str) -> Callable[[Notebook], None]:
    def edit(notebook: Notebook) -> None:
        found = cell(notebook, fragment)
        found["source"] = "".join(found["source"]).replace(fragment, new)

    return edit


def set_output(fragment: str, output: dict[str, Any]) -> Callable[[Notebook], None]:
    def edit(notebook: Notebook) -> None:
        cell(notebook, fragment)["outputs"] = [output]

    return edit


def stream(name: str, text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
BREAKS = {
    "changed code": (set_source("range(1, 6)", "range(1, 7)"), "the code was changed"),
    "changed output": (
        set_output("sums = [", stream("stdout", "after 5 terms: 0.97\n")),
        "outputs were changed",
    ),
    "stripped outputs": (strip_outputs, "outputs were changed or stripped"),
    "changed picture": (change_picture, "outputs were changed"),
    "doubled backslash": (add_text(r"$P(w \\mid h)$"), "a doubled backslash"),
    "removed fingerprint": (lambda n: n["metadata"].pop("lmtutorial"), "no fingerprint"),
    "directive": (add_text("```{note}\nLook.\n```"), "a MyST directive"),
    "colon fence": (add_text(":::{tip}\nLook.\n:::"), "MyST"),
    "role": (add_text("See {ref}`here`."), "a MyST role"),
    "label": (add_text("(here)=\ntext"), "a MyST label"),
    "footnote": (add_text("Text[^1]."), "a footnote"),
    "local picture": (add_text("![a curve](curve.png)"), "a local picture"),
    "picture without alt": (add_text("![](https://example.org/a.png)"), "without alt text"),
    "missing link": (add_text("[next](../none/none.ipynb)"), "link to missing"),
    "figure without alt": (remove_alt, "a picture without alt text"),
    "execution counts": (lambda n: cell(n, "sums = [").update(execution_count=9), "execution counts"),
    "equal ids": (lambda n: n["cells"][1].update(id=n["cells"][0]["id"]), "not unique"),
    "odd id": (lambda n: n["cells"][1].update(id="mine"), "not in its stored form"),
    "odd metadata": (lambda n: n["cells"][1]["metadata"].update(collapsed=True), "not in its stored form"),
    "no Colab cell": (lambda n: n["cells"].remove(cell(n, "google.colab")), "not the Colab cell"),
    "edited Colab cell": (set_source("%pip install -q", "%pip install"), "not the Colab cell"),
    "no title": (set_source("# A tiny chapter", "A tiny chapter"), "title"),
    "two titles": (add_text("# Another"), "exactly one title"),
    "skipped level": (add_text("#### Deep"), "skips a level"),
    "no summary": (set_source("## Summary", "## In short"), "last sections"),
    "no solution": (set_source("# Solution to exercise 2", "# The gap"), "solution cells"),
    "solution elsewhere": (set_source("### Exercise 2", "### Exercise 4"), "exercise"),
    "solution without assert": (set_source("assert sums[0] == 0.5", "sums[0] == 0.5"), "asserts nothing"),
    "error": (set_output("sums = [", ERROR), "an error output"),
    "warning": (set_output("sums = [", stream("stderr", "UserWarning")), "stderr"),
    "path": (set_output("sums = [", stream("stdout", "/home/ada/book")), "a local path"),
    "address": (set_output("sums = [", stream("stdout", "<object at 0x7f3a5c001d90>")), "memory address"),
    "long line": (set_source("sums = [", f"# {'long ' * 25}\nsums = ["), "a line of"),
}


def test_a_good_notebook_is_green(chapter: Path) -> None:
    assert notebooks.check_file(chapter) == []
    assert notebooks.main(["--check", str(chapter)]) == 0


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_notebook_is_red(name: str, chapter_text: str, tmp_path: Path) -> None:
    edit, expected = BREAKS[name]
    broken = edited(chapter_text, edit)
    assert broken != chapter_text
    found = problems(broken, tmp_path)
    assert any(expected in problem for problem in found), found


def test_a_file_that_is_no_notebook_is_red(tmp_path: Path) -> None:
    assert "not a valid notebook" in problems("{}", tmp_path)[0]


def test_the_check_exits_with_1_on_a_broken_notebook(
    chapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chapter.write_text(edited(chapter.read_text(encoding="utf-8"), strip_outputs), encoding="utf-8")
    assert notebooks.main(["--check", str(chapter)]) == 1
    assert "stripped" in capsys.readouterr().err


def test_running_twice_changes_no_byte(chapter: Path, chapter_text: str) -> None:
    assert notebooks.run_file(chapter) is False
    assert chapter.read_text(encoding="utf-8") == chapter_text


def test_changed_code_is_stored_with_its_new_output(chapter: Path) -> None:
    text = edited(chapter.read_text(encoding="utf-8"), set_source("range(1, 6)", "range(1, 7)"))
    chapter.write_text(text, encoding="utf-8")
    assert notebooks.run_file(chapter) is True
    assert notebooks.check_file(chapter) == []
    assert "after 6 terms" in chapter.read_text(encoding="utf-8")


def test_stripped_outputs_come_back_by_running(chapter: Path) -> None:
    chapter.write_text(edited(chapter.read_text(encoding="utf-8"), strip_outputs), encoding="utf-8")
    assert notebooks.run_file(chapter) is True
    assert notebooks.check_file(chapter) == []


def test_normalizing_without_running_never_hides_changed_code(chapter: Path) -> None:
    text = edited(chapter.read_text(encoding="utf-8"), set_source("range(1, 6)", "range(1, 7)"))
    chapter.write_text(text, encoding="utf-8")
    notebooks.normalize_file(chapter)
    assert "the code was changed after it was run" in notebooks.check_file(chapter)


def test_edited_prose_needs_no_run(chapter: Path) -> None:
    text = edited(chapter.read_text(encoding="utf-8"), add_text("One more remark."))
    chapter.write_text(text, encoding="utf-8")
    notebooks.normalize_file(chapter)
    assert notebooks.check_file(chapter) == []


def test_a_script_and_its_notebook_say_the_same(chapter: Path, tmp_path: Path) -> None:
    script, again, target = tmp_path / "a.py", tmp_path / "b.py", tmp_path / "again.ipynb"
    assert notebooks.main(["to-py", str(chapter), str(script)]) == 0
    notebooks.main(["from-py", "--no-execute", str(script), str(target)])
    notebooks.main(["to-py", str(target), str(again)])
    assert script.read_text(encoding="utf-8") == again.read_text(encoding="utf-8")


def test_solutions_are_folded_and_labelled(chapter: Path) -> None:
    solution = cell(json.loads(chapter.read_text(encoding="utf-8")), "# Solution to exercise 2")
    assert solution["metadata"]["tags"] == ["hide-cell"]
    assert solution["metadata"]["mystnb"]["code_prompt_show"] == "Show the solution to exercise 2"


def test_unknown_tags_are_refused_by_name(chapter: Path) -> None:
    text = edited(
        chapter.read_text(encoding="utf-8"), lambda n: cell(n, "sums = [")["metadata"].update(tags=["hid"])
    )
    with pytest.raises(ValueError, match=r"unknown tags \['hid'\]; allowed are"):
        notebooks.normalize_file(_write(chapter, text))


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
