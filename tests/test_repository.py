"""One source for what is said in several places: the address, the version, the list of modules."""

import re
import tomllib
from pathlib import Path

import pytest

import lmtutorial

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
NAME = REPOSITORY.rsplit("/", 1)[1]
SUFFIXES = {".py", ".md", ".ipynb", ".yml", ".yaml", ".toml", ".cff", ".txt", ""}
LEFT_OUT = {".git", ".venv", "_build", "__pycache__", "runs", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
HOSTS = r"(?:github\.com|/github|mybinder\.org/v2/gh|raw\.githubusercontent\.com)"


def texts() -> list[Path]:
    found = [p for p in ROOT.rglob("*") if p.is_file() and p.suffix in SUFFIXES]
    return [p for p in found if not LEFT_OUT & set(p.relative_to(ROOT).parts) and "egg-info" not in str(p)]


def test_the_repositorys_address_is_the_same_everywhere() -> None:
    wanted = REPOSITORY.removeprefix("https://github.com/")
    others = []
    for path in texts():
        text = path.read_text(encoding="utf-8", errors="ignore")
        for owner in re.findall(HOSTS + rf"/([\w.-]+/{NAME})\b", text):
            others += [f"{path}: {owner}"] if owner != wanted else []
    assert others == []


@pytest.mark.parametrize("name", ["_config.yml", "CITATION.cff", "book/how_to_use.md"])
def test_the_address_is_said_where_readers_look(name: str) -> None:
    assert REPOSITORY in (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert PROJECT["version"] == lmtutorial.__version__
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_module_that_a_chapter_imports_is_in_the_api_reference() -> None:
    reference = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"automodule:: ([\w.]+)", reference))
    imported = set()
    for path in (ROOT / "book").rglob("*.ipynb"):
        if "_build" not in path.parts:
            text = path.read_text(encoding="utf-8")
            imported |= set(re.findall(r"(?:from|import) (lmtutorial(?:\.\w+)*)", text))
    assert imported <= documented | {"lmtutorial.models", "lmtutorial.decode"}


def test_every_documented_module_exists() -> None:
    reference = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    for module in re.findall(r"automodule:: ([\w.]+)", reference):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


def test_constraints_name_each_package_once_and_no_local_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    assert len({pin.split("==")[0] for pin in pins}) == len(pins)


@pytest.mark.parametrize("target", ["book", "test", "demo", "notebooks", "bench", "lint", "serve", "help"])
def test_the_makefile_has_the_promised_targets(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:.*## \S", makefile, flags=re.MULTILINE)
