"""Every stored notebook of the book is good, is in the table of contents, and stands where it should."""

import json
from pathlib import Path

import pytest
import yaml

import notebooks

ROOT = notebooks.ROOT
NOTEBOOKS = notebooks.book_notebooks()
PAGES = sorted(path for path in (ROOT / "book").rglob("*.md") if "_build" not in path.parts)


def toc_files() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [toc["root"], *chapters]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_good(path: Path) -> None:
    assert notebooks.check_file(path) == []


def test_the_book_has_notebooks() -> None:
    assert NOTEBOOKS


def test_every_page_is_in_the_table_of_contents_once() -> None:
    stored = [path.relative_to(ROOT).with_suffix("").as_posix() for path in [*NOTEBOOKS, *PAGES]]
    assert sorted(toc_files()) == sorted(stored)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_of_a_size_to_read(path: Path) -> None:
    """A guide for authors, with room: far outside of it a chapter is two chapters, or half of one."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    words = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    assert 1000 <= words <= 4000
    assert 20 <= len(cells) <= 90
    assert path.stat().st_size < 2_000_000
