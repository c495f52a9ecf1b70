"""The facts of the registry, against each other and against the files themselves."""

import gzip
import hashlib
import os

import pytest

from lmtutorial.files.registry import models, registry
from lmtutorial.files.storage import _given


def test_every_file_of_the_registry_has_a_hash_a_size_and_one_source_pinned():
    for entry in registry().values():
        assert entry.license, entry.name
        assert entry.source, entry.name
        assert len({file.name for file in entry.files}) == len(entry.files)
        for file in entry.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.size > 0
            assert bool(file.url) != bool(file.requirement)
            if file.url:
                commit = file.url.split("/")[5]
                assert len(bytes.fromhex(commit)) == 20
            else:
                assert "==" in file.requirement


def test_every_model_has_a_license_hashes_and_one_source_pinned():
    assert not models().keys() & registry().keys()
    for entry in models().values():
        assert entry.license, entry.name
        assert entry.getter == "load_pretrained"
        for file in entry.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert bool(file.url) != bool(file.requirement)
            if file.url:
                owner_and_name, _, commit_and_file = file.url.partition("/resolve/")
                assert owner_and_name == entry.source
                assert len(bytes.fromhex(commit_and_file.split("/")[0])) == 20
            else:
                assert file.requirement.replace("-", "_").replace("==", "-") in file.archive
                assert len(bytes.fromhex(file.archive_sha256)) == 32


def test_the_registry_is_right_about_every_file_that_is_here():
    given = os.environ.get("LMTUTORIAL_DATA")
    if not given:
        pytest.skip("LMTUTORIAL_DATA names no folder with the benchmark files")
    checked = 0
    for entry in registry().values():
        for file in entry.files:
            path = _given(file, entry)
            if path is None:
                continue
            content = path.read_bytes() if path.name == file.name else gzip.decompress(path.read_bytes())
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256), path
            checked += 1
    assert checked > 0
