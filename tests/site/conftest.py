"""The built site, served on this machine, and a browser to open it with."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from notebooks import ROOT

HTML = ROOT / "book" / "_build" / "html"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def chromium() -> str | None:
    named = os.environ.get("CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser")


def is_current() -> bool:
    """Whether the built site is newer than everything that it is made of."""
    index = HTML / "index.html"
    if not index.exists():
        return False
    sources = [ROOT / "_config.yml", ROOT / "_toc.yml", *(ROOT / "lmtutorial").rglob("*.py")]
    sources += [path for path in (ROOT / "book").rglob("*.*") if "_build" not in path.parts]
    times = [p.stat().st_mtime for p in sources if "__pycache__" not in p.parts]
    return max(times) <= (HTML / "searchindex.js").stat().st_mtime


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built site; built here, with warnings as errors, where it is missing or old."""
    if not is_current():
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(ROOT)]
        command += ["--path-output", str(ROOT / "book"), "-W", "-n", "--keep-going", "--all", "-q"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return HTML


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium here: install Debian's chromium, or name one in the variable CHROMIUM")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield opened
        opened.close()
