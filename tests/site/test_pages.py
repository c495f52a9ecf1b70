"""Every page, in light and dark, on a laptop and on a phone: it loads, reads well and stays at home."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from notebooks import ROOT

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
READY = """async () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  if (window.MathJax) await MathJax.startup.promise;
  await document.fonts.ready;
}"""
MATH = """() => ({
  formulas: document.querySelectorAll("span.math, div.math").length,
  typeset: document.querySelectorAll("span.math mjx-container, div.math mjx-container").length,
  errors: [...document.querySelectorAll("mjx-merror")].map(e => e.title || e.textContent),
})"""
WIDER = """() => [...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).position !== "fixed")
  .slice(0, 5).map(e => `${e.tagName}.${e.className}`)"""


class Visit:
    """One page in one view, with everything that went wrong or off-site while it loaded."""

    def __init__(self, browser: Any, address: str, page: str, width: int, scheme: str) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(f"{address}{page}")
        self.page.evaluate(READY)

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *problem: object) -> None:
        self.context.close()


def violations(page: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {node['html'][:160]}" for v in found for node in v["nodes"][:3]]


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_sound(name: str, width: int, scheme: str, browser: Any, address: str) -> None:
    """No errors, no requests to other hosts, formulas typeset, no sideways scrolling, accessible."""
    with Visit(browser, address, f"{name}.html", width, scheme) as visit:
        page = visit.page
        assert visit.errors == []
        assert visit.elsewhere == []
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        math = page.evaluate(MATH)
        assert math["errors"] == []
        assert math["typeset"] == math["formulas"]
        overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, page.evaluate(WIDER)
        assert violations(page) == []


def test_the_search_finds_without_a_network(browser: Any, address: str) -> None:
    with Visit(browser, address, "search.html?q=perplexity", 1280, "light") as visit:
        visit.page.wait_for_selector("ul.search li a", timeout=15_000)
        assert visit.elsewhere == []
        assert visit.errors == []


def test_the_root_leads_to_the_landing_page(browser: Any, address: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(address, wait_until="commit")
    page.wait_for_url(f"{address}{TOC['root']}.html", timeout=15_000)
    assert page.title().startswith("Language models, hands on")
    context.close()


def test_every_page_was_built(site: Path) -> None:
    assert [name for name in PAGES if not (site / f"{name}.html").exists()] == []


def test_solutions_are_folded(browser: Any, address: str) -> None:
    chapter = next(name for name in PAGES if (ROOT / f"{name}.ipynb").exists())
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{address}{chapter}.html")
    folds = page.locator("details", has_text="Show the solution to exercise 1")
    assert folds.count() == 1
    assert folds.first.evaluate("fold => fold.open") is False
    context.close()
