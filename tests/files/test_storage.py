"""Where a corpus's files are looked for, kept, and what is said when they cannot be had."""

import errno
import gzip
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from local_server import CONTENT, Server

from lmtutorial.files import registry as registry_module
from lmtutorial.files import storage
from lmtutorial.files.download import DownloadError, is_intact
from lmtutorial.files.registry import Entry, lookup
from lmtutorial.files.storage import cache_dir, fetch, files, is_present


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home, an empty temporary folder, no setting of the user's."""
    for name in ("LMTUTORIAL_DATA", "LMTUTORIAL_CACHE", "LMTUTORIAL_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder, temporary = tmp_path / "my home", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return folder


@pytest.fixture
def toy(monkeypatch):
    """A corpus "toy" of one file, on a server that counts its requests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    entry = Entry("toy", "toyfolder", "for the tests", "none", "here", (server.file(),))
    monkeypatch.setattr(registry_module, "registry", lambda: {"toy": entry})
    yield server
    server.shutdown()
    server.server_close()


def all_files(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_and_read_from_the_cache_after_that(home, toy, monkeypatch):
    assert not is_present(lookup("toy"))
    assert fetch("toy") == home / ".cache" / "lmtutorial" / "toyfolder"
    assert is_present(lookup("toy"))
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    assert files("toy")["file.txt"].read_bytes() == CONTENT
    assert len(toy.ranges) == 1


def test_a_file_damaged_in_the_cache_is_fetched_again(home, toy):
    path = files("toy")["file.txt"]
    path.write_bytes(b"x" + CONTENT[1:])
    assert files("toy")["file.txt"].read_bytes() == CONTENT
    assert len(toy.ranges) == 2


def test_the_cache_is_where_the_variables_say(home, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lmtutorial"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == home / ".cache" / "lmtutorial"
    monkeypatch.setenv("LMTUTORIAL_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_offline_and_missing_is_an_error_that_says_what_to_do_and_asks_nobody(home, toy, monkeypatch, value):
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", value)
    with pytest.raises(
        DownloadError, match=r"toy needs file\.txt, which is not in .*LMTUTORIAL_OFFLINE.*fetch\('toy'\)"
    ):
        fetch("toy")
    assert toy.ranges == []
    assert all_files(home) == []


@pytest.mark.parametrize("value", ["", "0", "false", "No"])
def test_offline_can_be_switched_off(home, toy, monkeypatch, value):
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", value)
    assert fetch("toy").is_dir()


def test_offline_and_damaged_says_damaged(home, toy, monkeypatch):
    files("toy")["file.txt"].write_bytes(b"damaged")
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    with pytest.raises(DownloadError, match="which is damaged in"):
        fetch("toy")


def test_a_folder_of_your_own_is_read_in_place_and_nothing_is_cached(home, toy, monkeypatch, tmp_path):
    mine = tmp_path / "data" / "toyfolder"
    mine.mkdir(parents=True)
    (mine / "file.txt").write_bytes(CONTENT)
    monkeypatch.setenv("LMTUTORIAL_DATA", str(tmp_path / "data"))
    assert is_present(lookup("toy"))
    assert fetch("toy") == mine
    assert toy.ranges == []
    assert all_files(home) == []


def test_a_gzipped_copy_in_your_folder_is_unpacked_into_the_cache(home, toy, monkeypatch, tmp_path):
    mine = tmp_path / "data" / "toyfolder"
    mine.mkdir(parents=True)
    (mine / "file.txt.gz").write_bytes(gzip.compress(CONTENT))
    monkeypatch.setenv("LMTUTORIAL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    assert is_present(lookup("toy"))
    assert files("toy")["file.txt"].read_bytes() == CONTENT
    assert all_files(mine) == ["file.txt.gz"]
    assert toy.ranges == []


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"other"), gzip.compress(CONTENT)[:-9], b"no gzip at all", b"\x1f\x8b\x08" + bytes(40)],
    ids=["another file", "cut short", "no gzip", "zeros"],  # not the bytes, which hold the time of day
)
def test_a_wrong_copy_in_your_folder_is_an_error_not_a_download(home, toy, monkeypatch, tmp_path, content):
    mine = tmp_path / "data" / "toyfolder"
    mine.mkdir(parents=True)
    (mine / "file.txt.gz").write_bytes(content)
    monkeypatch.setenv("LMTUTORIAL_DATA", str(tmp_path / "data"))
    with pytest.raises(
        DownloadError, match=r"file\.txt\.gz in LMTUTORIAL_DATA does not hold what is expected"
    ):
        fetch("toy")
    assert toy.ranges == []
    assert all_files(home) == []


def test_a_folder_of_your_own_that_is_not_there_is_an_error(home, toy, monkeypatch, tmp_path):
    monkeypatch.setenv("LMTUTORIAL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"LMTUTORIAL_DATA=.*nowhere is not a folder"):
        fetch("toy")


def test_what_your_folder_lacks_is_downloaded(home, toy, monkeypatch, tmp_path):
    monkeypatch.setenv("LMTUTORIAL_DATA", str(tmp_path))
    assert files("toy")["file.txt"].read_bytes() == CONTENT


def test_a_home_that_cannot_be_written_gives_a_temporary_cache_with_a_warning_and_it_is_found_again(
    home, toy, monkeypatch
):
    home.rmdir()
    home.write_text("a file, so that no folder can be made in it")
    with pytest.warns(UserWarning, match=r"cannot be written .* keeping downloads in .*Set LMTUTORIAL_CACHE"):
        folder = fetch("toy")
    assert folder.is_relative_to(tempfile.gettempdir())
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch("toy") == folder
    assert len(toy.ranges) == 1


def test_a_cache_that_was_chosen_and_cannot_be_written_is_an_error(home, toy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMTUTORIAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"LMTUTORIAL_CACHE=.*file cannot be written"):
        fetch("toy")
    assert toy.ranges == []


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs POSIX links")
def test_a_temporary_cache_laid_by_someone_else_is_not_used(home, toy, tmp_path):
    home.rmdir()
    home.write_text("")
    (tmp_path / "trap").mkdir()
    storage._temporary_cache().symlink_to(tmp_path / "trap")
    with pytest.raises(PermissionError, match=r"belongs to someone else; set LMTUTORIAL_CACHE"):
        fetch("toy")
    assert all_files(tmp_path / "trap") == []


def test_a_read_only_cache_that_has_the_file_is_good_enough(home, toy, monkeypatch):
    folder = fetch("toy")

    def refuse(*args):
        raise AssertionError("nothing needs to be written")

    monkeypatch.setattr(storage, "_writable_cache", refuse)
    assert fetch("toy") == folder


def test_two_processes_at_once_both_get_the_file(home, toy):
    file = toy.file()
    program = (
        "import sys; from pathlib import Path; from lmtutorial.files.registry import DataFile;"
        "from lmtutorial.files.download import download; \n"
        "f = DataFile('file.txt', int(sys.argv[2]), *sys.argv[3:]);"
        "download(f, Path(sys.argv[1]))"
    )
    arguments = [str(home / "file.txt"), str(file.size), file.sha256, file.url]
    runs = [subprocess.Popen([sys.executable, "-c", program, *arguments]) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert all_files(home) == ["file.txt"]
    assert is_intact(home / "file.txt", file)


def test_a_full_disk_is_an_error_that_names_the_folder_and_the_size_and_leaves_no_file(
    home, toy, monkeypatch
):
    opened = Path.open

    def open_on_full_disk(self, mode="r", **options):
        stream = opened(self, mode, **options)
        return FullDisk(stream) if self.suffix == ".part" and mode in ("ab", "wb") else stream

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(
        OSError, match=r"no space left for file\.txt \(307,200 bytes\).*LMTUTORIAL_CACHE"
    ) as raised:
        fetch("toy")
    assert raised.value.errno == errno.ENOSPC
    assert str(cache_dir()) in str(raised.value)
    assert all_files(home) == []


class FullDisk:
    """A stream to a disk that takes 100 bytes more."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def write(self, chunk):
        self.stream.write(chunk[:100])
        raise OSError(errno.ENOSPC, "No space left on device")
