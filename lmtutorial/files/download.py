"""A file from the web: whole and with the expected hash, or not there at all.

The bytes go to a partial file beside the final place. Only when their SHA-256 is right is it renamed into
place, in one step, so no reader ever sees half a file. Nothing is locked: each process writes a partial file
of its own, and the last rename wins with the same bytes. What arrived before the network failed is kept as
`*.part`; the next call takes it over (by a rename, which only one process can win) and asks for the rest.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lmtutorial import __version__
from lmtutorial.files.registry import DataFile

if TYPE_CHECKING:
    from tqdm import tqdm

RETRIED = frozenset({408, 416, 425, 429, 500, 502, 503, 504})
"""HTTP status codes that may pass: overload, or a range that the server does not have."""
LONGEST_WAIT = 30.0
"""Seconds to wait before one attempt, whatever the server's Retry-After asks for."""
ABANDONED = 3600.0
"""Seconds after which a partial file that nobody writes to may be taken over from a process that died."""


class DownloadError(OSError):
    """A file could not be had: no network, an answer other than the file, wrong bytes."""


def is_intact(path: Path, file: DataFile) -> bool:
    """Whether `path` is a file with the size and SHA-256 of `file`."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256


def download(
    file: DataFile, path: Path, *, attempts: int = 5, wait: float = 0.5, timeout: float = 30.0
) -> None:
    """Fetch `file.url` to `path`, showing a progress bar on a terminal.

    Tries up to `attempts` times, `wait` seconds apart and twice as long each time; a connection that says
    nothing for `timeout` seconds counts as failed. Each attempt goes on where the one before stopped, if the
    server can (HTTP ranges).

    Raises DownloadError, or OSError with errno ENOSPC where the disk is full. `path` is then not written.
    """
    from tqdm.auto import tqdm

    shared = path.with_name(f"{path.name}.{file.sha256[:8]}.part")
    with full_disk_explained(path, file):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _own_part(shared)
        try:
            with tqdm(total=file.size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                resumed = _fill(part, file, attempts, wait, timeout, bar)
                if resumed and not is_intact(part, file):  # what was kept may be what is wrong
                    part.unlink()
                    _fill(part, file, attempts, wait, timeout, bar)
            put_in_place(part, path, file, file.url)
        except _NETWORK as error:
            tries = f" after {attempts} attempts" if _may_pass(error) else ""
            raise DownloadError(
                f"could not download {file.url}{tries}: {_reason(error)}. Check the network, or a proxy in "
                f"HTTPS_PROXY, and try again{_keep(part, shared)}. Or put a copy of the file at {path}"
            ) from error
        except KeyboardInterrupt:
            _keep(part, shared)
            raise
        finally:
            part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path, file: DataFile, source: str) -> None:
    """Rename `part` to `path` if it is `file`; raises DownloadError, and deletes it, if it is not."""
    if not is_intact(part, file):
        with part.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        size = part.stat().st_size
        part.unlink()
        raise DownloadError(
            f"{source} gave the wrong bytes for {file.name}: SHA-256 {found} ({size:,} bytes) instead of "
            f"{file.sha256} ({file.size:,} bytes). Nothing was kept. Try again on another network: a "
            "proxy or a sign-in page may have answered in its place"
        )
    try:
        part.replace(path)
    except PermissionError:  # on Windows, while another process reads the file that it has put there
        if not is_intact(path, file):
            raise


def write_in_place(content: bytes, path: Path, file: DataFile, source: str) -> None:
    """As `put_in_place`, with the bytes in memory."""
    with full_disk_explained(path, file):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{file.sha256[:8]}.{_unique()}.part")
        try:
            part.write_bytes(content)
            put_in_place(part, path, file, source)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def full_disk_explained(path: Path, file: DataFile) -> Iterator[None]:
    """Where the disk is full, raise an OSError (errno ENOSPC) that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left for {file.name} ({file.size:,} bytes) in {path.parent}; free some space, or set "
            "LMTUTORIAL_CACHE to a folder on another disk",
        ) from error


_NETWORK = (URLError, ConnectionError, TimeoutError, HTTPException, ssl.SSLError)


class _Truncated(ConnectionError):
    """The connection ended, politely, before the file did."""


def _own_part(shared: Path) -> Path:
    """A name for this process's partial file, holding what an earlier one left, if anything is left."""
    own = shared.with_name(f"{shared.stem}.{_unique()}.part")
    for left in (shared, *shared.parent.glob(f"{glob.escape(shared.stem)}.*.part")):
        try:
            if left == shared or time.time() - left.stat().st_mtime > ABANDONED:
                left.rename(own)
                break
        except OSError:  # not there, or another process was first
            continue
    return own


def _unique() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _keep(part: Path, shared: Path) -> str:
    """Leave the partial file to the next call; returns how to say so."""
    if not part.is_file() or not (size := part.stat().st_size):
        return ""
    part.replace(shared)
    return f" (it goes on after the {size:,} bytes that arrived)"


def _fill(part: Path, file: DataFile, attempts: int, wait: float, timeout: float, bar: tqdm[Any]) -> bool:
    """Bring `part` to its full size; returns whether it was put together from more than one answer."""
    resumed = False
    for attempt in range(1, attempts + 1):
        have = part.stat().st_size if part.is_file() else 0
        resumed = resumed or have > 0
        if have == file.size:
            break
        try:
            _receive(part, file, have, timeout, bar)
            break
        except _NETWORK as error:
            if isinstance(error, HTTPError) and error.code == 416:
                part.unlink(missing_ok=True)
            if attempt == attempts or not _may_pass(error):
                raise
            time.sleep(max(min(wait * 2 ** (attempt - 1), LONGEST_WAIT), _retry_after(error)))
    return resumed


def _receive(part: Path, file: DataFile, have: int, timeout: float, bar: tqdm[Any]) -> None:
    """One request, appended to the `have` bytes of `part` if the server can go on from there."""
    headers = {"User-Agent": f"lmtutorial/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urlopen(Request(file.url, headers=headers), timeout=timeout) as response:
        if not _continues(response, have):
            have = 0
        announced = response.headers.get("Content-Length")
        if announced is not None and have + int(announced) != file.size:
            raise DownloadError(
                f"{file.url} offers {have + int(announced):,} bytes instead of {file.size:,}: that is "
                "another file. A proxy or a sign-in page may have answered in its place; try another network"
            )
        bar.n = have
        with part.open("ab" if have else "wb") as stream:
            while have <= file.size and (chunk := response.read1(1 << 16)):
                have += stream.write(chunk)
                bar.update(len(chunk))
    if have < file.size:
        raise _Truncated(f"the connection ended after {have:,} of {file.size:,} bytes")


def _continues(response: HTTPResponse, have: int) -> bool:
    """Whether the answer starts right after the bytes that are there."""
    span = response.headers.get("Content-Range") or ""
    return have > 0 and response.status == 206 and span.startswith(f"bytes {have}-")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code in RETRIED
    return not isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError)


def _retry_after(error: Exception) -> float:
    asked = (error.headers.get("Retry-After") or "") if isinstance(error, HTTPError) and error.headers else ""
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or type(error).__name__
