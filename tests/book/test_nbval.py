"""`pytest --nbval` with the book's own comparison catches results that changed, and forgives last digits."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import notebooks

ROOT = notebooks.ROOT
CHANGES = {
    "a number beyond the tolerance": ("after 5 terms: 0.96875", "after 5 terms: 0.90875"),
    "an integer": ("after 5 terms: 0.96875", "after 4 terms: 0.96875"),
    "a word": ("after 5 terms: 0.96875", "with 5 terms: 0.96875"),
    "code": ("[1 - 2.0**-n for n", "[1 - 2.2**-n for n"),
    "the stored data of a figure": ("y 0.500 0.750 0.875", "y 0.500 0.700 0.875"),
    "the data that a figure draws": ('curves({\\"sum\\": sums}', 'curves({\\"sum\\": sums[::-1]}'),
    "a claim": ("assert sums[0] == 0.5", "assert sums[0] == 0.4"),
}
HARMLESS = {
    "nothing": ("", ""),
    "last digits": ("after 5 terms: 0.96875", "after 5 terms: 0.96874"),
    "last digits of a figure": ("y 0.500 0.750 0.875", "y 0.501 0.749 0.875"),
    "the clock": ("clock: ", "clock: 1"),
}


@pytest.fixture(scope="module")
def report(chapter_text: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What nbval says of the tiny chapter in every variant, each a notebook in one folder."""
    folder = tmp_path_factory.mktemp("variants")
    shutil.copy(ROOT / "book" / "conftest.py", folder / "conftest.py")
    for name, (old, new) in (CHANGES | HARMLESS).items():
        assert old in chapter_text, f"{name}: the tiny chapter has no {old!r}"
        variant = chapter_text.replace(old, new) if old else chapter_text
        json.loads(variant)
        (folder / f"{name.replace(' ', '_')}.ipynb").write_text(variant, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-rpf", "-n", "2", "--dist", "loadfile", "--nbval"]
    command += [
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
        str(folder),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def outcomes(report: str, name: str) -> tuple[int, int]:
    lines = [line for line in report.splitlines() if f"{name.replace(' ', '_')}.ipynb::" in line]
    return sum(line.startswith("PASSED") for line in lines), sum(line.startswith("FAILED") for line in lines)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_result_fails(name: str, report: str) -> None:
    passed, failed = outcomes(report, name)
    assert failed >= 1, report
    assert passed >= 1  # the other cells ran: it is this change that failed, not the notebook


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_difference_passes(name: str, report: str) -> None:
    passed, failed = outcomes(report, name)
    assert failed == 0, report
    assert passed >= 8
