"""Downloads against a local server that fails in each of the ways that networks do."""

import hashlib
import os
import ssl
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_server import CONTENT, Server

from lmtutorial.files import download as module
from lmtutorial.files.download import DownloadError, download, is_intact, write_in_place
from lmtutorial.files.registry import DataFile


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(*plan):
        servers.append(Server(*plan))
        return servers[-1]

    yield start
    for server in servers:
        server.stop.set()
        server.shutdown()
        server.server_close()


def get(server, path, **options):
    download(server.file(), path, **{"wait": 0.01, "timeout": 5.0, "attempts": 4} | options)


def names(folder: Path):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "plan",
    [
        ["serve"],
        ["nolength"],
        [500, "serve"],
        [503, 429, "serve"],
        ["truncate", "serve"],
        ["truncate norange", "norange"],
        ["truncate nolength", "truncate nolength", "nolength"],
        ["truncate", "truncate", "truncate", "serve"],
        ["truncate", 416, "serve"],
    ],
    ids=str,
)
def test_a_failure_that_passes_is_tried_again_and_only_the_whole_file_is_left(serve, tmp_path, plan):
    server = serve(*plan)
    get(server, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.txt"]
    assert len(server.ranges) == len(plan)


def test_a_retry_asks_only_for_the_bytes_that_lack(serve, tmp_path):
    server = serve("truncate", "serve")
    get(server, tmp_path / "file.txt")
    assert server.ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_stalled_connection_is_given_up_after_the_timeout_and_resumed(serve, tmp_path):
    server = serve("stall", "serve")
    begin = time.monotonic()
    get(server, tmp_path / "file.txt", timeout=0.2)
    assert (tmp_path / "file.txt").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-"]
    assert time.monotonic() - begin < 5


def test_what_arrived_before_the_network_went_is_kept_and_the_next_call_goes_on_from_there(serve, tmp_path):
    server = serve("truncate", 503, 503, "serve")
    with pytest.raises(
        DownloadError, match=r"after 3 attempts: HTTP 503 .*it goes on after the 153,600 bytes"
    ):
        get(server, tmp_path / "file.txt", attempts=3)
    assert names(tmp_path) == [f"file.txt.{server.file().sha256[:8]}.part"]
    get(server, tmp_path / "file.txt")
    assert server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"
    assert names(tmp_path) == ["file.txt"]


def test_a_kept_part_that_is_wrong_is_thrown_away_and_the_file_fetched_whole(serve, tmp_path):
    server = serve("serve")
    (tmp_path / f"file.txt.{server.file().sha256[:8]}.part").write_bytes(b"not the beginning")
    get(server, tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == CONTENT
    assert server.ranges == ["bytes=17-", None]
    assert names(tmp_path) == ["file.txt"]


def test_a_part_left_by_a_killed_process_is_taken_over_once_it_is_old_and_left_alone_before(serve, tmp_path):
    server = serve("serve")
    left = tmp_path / f"file.txt.{server.file().sha256[:8]}.123-abcd.part"
    left.write_bytes(CONTENT[:5000])
    get(server, tmp_path / "file.txt")
    assert server.ranges == [None]
    assert left.is_file()
    os.utime(left, (0, 0))
    get(server, tmp_path / "file.txt")
    assert server.ranges[-1] == "bytes=5000-"
    assert not left.exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("wrong", r"wrong bytes for file\.txt: SHA-256 [0-9a-f]{64} \(307,200 bytes\) instead of"),
        ("wrong nolength", r"wrong bytes"),
        ("long nolength", r"wrong bytes"),
        ("portal", r"offers 20 bytes instead of 307,200.*sign-in page"),
        (404, r"could not download http\S+: HTTP 404 Not Found"),
        (403, r"HTTP 403"),
    ],
    ids=str,
)
def test_an_answer_that_will_not_change_is_an_error_at_once_and_leaves_nothing(
    serve, tmp_path, plan, message
):
    server = serve(plan)
    with pytest.raises(DownloadError, match=message):
        get(server, tmp_path / "file.txt")
    assert names(tmp_path) == []
    assert len(server.ranges) == 1


def test_wrong_bytes_leave_the_file_that_was_there_as_it_was(serve, tmp_path):
    (tmp_path / "file.txt").write_bytes(b"older")
    with pytest.raises(DownloadError):
        get(serve("wrong"), tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == b"older"


def test_a_server_that_always_truncates_and_cannot_resume_is_an_error_that_counts(serve, tmp_path):
    server = serve("truncate norange")
    with pytest.raises(
        DownloadError, match=r"after 3 attempts: the connection ended after 153,600 of 307,200"
    ):
        get(server, tmp_path / "file.txt", attempts=3)
    assert len(server.ranges) == 3


def test_no_server_is_an_error_that_names_the_url_the_proxy_and_the_place_for_a_copy(serve, tmp_path):
    server = serve()
    file = server.file()
    server.shutdown()
    server.server_close()
    with pytest.raises(
        DownloadError, match=r"127\.0\.0\.1.*refused.*HTTPS_PROXY.*put a copy of the file at"
    ) as raised:
        download(file, tmp_path / "file.txt", wait=0.01, attempts=2)
    assert str(tmp_path / "file.txt") in str(raised.value)
    assert names(tmp_path) == []


def test_a_certificate_that_is_refused_is_not_tried_again(monkeypatch, tmp_path):
    calls = []

    def refuse(*args, **options):
        calls.append(args)
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(module, "urlopen", refuse)
    with pytest.raises(DownloadError, match="self-signed certificate"):
        download(DataFile("a", 1, "0" * 64, "https://example.invalid/a"), tmp_path / "a")
    assert len(calls) == 1


def test_ctrl_c_keeps_what_arrived_for_the_next_time(serve, tmp_path, monkeypatch):
    server = serve("truncate", "serve")

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "file.txt")
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [len(CONTENT) // 2]
    get(server, tmp_path / "file.txt")
    assert server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"
    assert names(tmp_path) == ["file.txt"]


def test_several_at_once_do_each_other_no_harm(serve, tmp_path):
    server = serve("truncate", "serve", "truncate", "norange", "serve")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: get(server, tmp_path / "file.txt"), range(12)))
    assert (tmp_path / "file.txt").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.txt"]


def test_the_server_is_given_the_time_that_it_asks_for_up_to_a_bound():
    def error(headers):
        return urllib.error.HTTPError("http://a", 429, "slow down", headers, None)

    assert module._retry_after(error({"Retry-After": "7"})) == 7
    assert module._retry_after(error({"Retry-After": "86400"})) == module.LONGEST_WAIT
    assert module._retry_after(error({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0
    assert module._retry_after(error({})) == 0


@given(st.binary(max_size=64), st.data())
def test_only_the_very_bytes_are_intact(content, data):
    import tempfile

    file = DataFile("f", len(content), hashlib.sha256(content).hexdigest())
    other = data.draw(st.binary(max_size=64))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        assert not is_intact(path, file)
        path.write_bytes(other)
        assert is_intact(path, file) == (other == content)
        path.unlink()
        write_in_place(content, path, file, "memory")
        assert is_intact(path, file)
        if other != content:
            with pytest.raises(DownloadError, match="memory gave the wrong bytes"):
                write_in_place(other, path, file, "memory")
        assert names(Path(folder)) == ["f"]
        assert is_intact(path, replace(file, name="another name"))
