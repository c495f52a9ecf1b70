"""What the built pages say: launch buttons, alternative texts, no trace of the build machine."""

import re
from pathlib import Path

import pytest

from notebook_form import repository
from notebooks import ROOT, book_notebooks

CHAPTERS = [path.relative_to(ROOT).with_suffix("").as_posix() for path in book_notebooks()]


@pytest.fixture(scope="module")
def repository_path() -> str:
    return repository().removeprefix("https://github.com/")


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_opens_on_colab_and_binder(name: str, site: Path, repository_path: str) -> None:
    html = (site / f"{name}.html").read_text(encoding="utf-8")
    colab = f"https://colab.research.google.com/github/{repository_path}/blob/main/{name}.ipynb"
    binder = f"https://mybinder.org/v2/gh/{repository_path}/main?urlpath=lab/tree/{name}.ipynb"
    assert colab in html
    assert binder in html


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_figure_has_a_written_alternative(name: str, site: Path) -> None:
    html = (site / f"{name}.html").read_text(encoding="utf-8")
    article = html[html.index("<article") : html.index("</article>")]
    for image in re.findall(r"<img\b[^>]*>", article):
        alt = re.search(r'alt="([^"]*)"', image)
        assert alt, image
        assert len(alt.group(1)) >= 20, image
        assert not alt.group(1).endswith(".png"), image


def test_the_colab_cell_is_not_shown(site: Path) -> None:
    for name in CHAPTERS:
        assert "google.colab" not in (site / f"{name}.html").read_text(encoding="utf-8")


def test_no_page_asks_other_hosts_for_scripts_styles_or_pictures(site: Path) -> None:
    loaded = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(https?://[^"]+)"[^>]*>')
    for path in site.rglob("*.html"):
        tags = [m for m in loaded.finditer(path.read_text(encoding="utf-8"))]
        outside = [m.group(1) for m in tags if 'rel="canonical"' not in m.group(0)]
        assert outside == [], path


def test_no_page_tells_where_it_was_built(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path
