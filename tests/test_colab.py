"""Installing the package into Google Colab replaces nothing that Colab has."""

import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from notebook_form import EXTRAS, colab_source

ROOT = Path(__file__).resolve().parent.parent
LISTED = ROOT / "tests" / "data" / "colab-packages-2026-08-19.txt"
MARKERS = {"python_version": "3.13", "python_full_version": "3.13.5", "sys_platform": "linux", "extra": ""}
MARKERS |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}


def colab() -> dict[str, str]:
    lines = LISTED.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def requirements(lines: list[str]) -> list[Requirement]:
    parsed = [Requirement(line) for line in lines]
    return [r for r in parsed if r.marker is None or r.marker.evaluate(MARKERS)]


def direct() -> list[Requirement]:
    """What the chapters' first cells install: the package, and the extras that some of them name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return requirements([*project["dependencies"], *extras])


def with_new_packages(first: list[Requirement], present: dict[str, str]) -> Iterator[Requirement]:
    """The requirements, and those of every package among them that Colab does not have, and so on."""
    waiting, seen = list(first), set()
    while waiting:
        requirement = waiting.pop()
        yield requirement
        name = canonicalize_name(requirement.name)
        if name not in present and name not in seen:
            seen.add(name)
            waiting += requirements(importlib.metadata.requires(name) or [])


def conflicts(first: list[Requirement], present: dict[str, str]) -> list[str]:
    needed = with_new_packages(first, present)
    return [
        f"{need} replaces {present[name]}"
        for need in needed
        if (name := canonicalize_name(need.name)) in present
        and not need.specifier.contains(present[name], prereleases=True)
    ]


def test_colab_keeps_every_version_it_has() -> None:
    """No requirement excludes a version that Colab has, so pip has nothing to replace.

    By metadata: our own requirements from pyproject.toml; those of the packages that Colab lacks, and in
    turn of what these need, from the versions installed here, which stand for the newest ones.
    """
    assert conflicts(direct(), colab()) == []


def test_little_is_new_on_colab() -> None:
    present = colab()
    new = {canonicalize_name(r.name) for r in with_new_packages(direct(), present)} - present.keys()
    assert "torch" not in new
    assert new <= {
        "sacrebleu",
        "tyro",
        "portalocker",
        "colorama",
        "lxml",
        "docstring-parser",
        "shtab",
        "typeguard",
        "gguf",
    }


@pytest.mark.parametrize(
    ("code", "extras"),
    [
        ("from lmtutorial.gguf_file import open_gguf", "[gguf]"),
        ('load_pretrained("smollm2-135m")', "[gguf]"),
        ('load_pretrained("smollm2-135m-base"); load_pretrained("shakespeare")', ""),
    ],
)
def test_a_chapter_that_reads_gguf_files_installs_what_reads_them(code: str, extras: str) -> None:
    source = colab_source(["import torch", code])
    assert f'"lmtutorial{extras} @ git+' in source
    assert colab_source([source, "import torch", code]) == source


@pytest.mark.parametrize("demand", ["torch>=2.12", "numpy<2", "tqdm==4.66.0"])
def test_a_requirement_that_would_replace_something_is_found(demand: str) -> None:
    assert len(conflicts([*direct(), Requirement(demand)], colab())) == 1


def test_a_conflict_deep_among_new_packages_is_found() -> None:
    """tyro is new on Colab; what it needs counts as well."""
    assert "tyro" not in colab()
    older = colab() | {"typeguard": "1.0.0"}
    assert any("typeguard" in conflict for conflict in conflicts(direct(), older))
