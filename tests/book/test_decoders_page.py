"""The page on the decoders: its programs and commands run, and its table is the package's own."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmtutorial.cli import main
from lmtutorial.decoders import OPTIONS, Decoding

PAGE = (Path(__file__).parents[2] / "book" / "decoders.md").read_text(encoding="utf-8")
REWARD, LIBRARY, CLIENT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS, SERVE = re.findall(r"```bash\n(.*?)```", PAGE.replace("\\\n", ""), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "kings.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_table_lists_each_decoder_with_its_options_and_their_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(Decoding)}
    rows = re.findall(r"^\* - `(\w+)`, .*\n  - .*\n  - (.*)$", PAGE, re.MULTILINE)
    assert [decoder for decoder, _ in rows] == list(OPTIONS)
    for decoder, options in rows:
        listed = dict(re.findall(r"`(\w+)` ?(\d*)", options))
        assert set(listed) == OPTIONS[decoder]
        for name, number in listed.items():
            assert defaults.get(name) == (float(number) if number else None), name


def test_the_program_writes_a_text_with_each_decoder(folder, capsys):
    exec(compile(LIBRARY, "decoders.md", "exec"), {})
    written = re.findall(r"^(\w+) +(['\"].+['\"])$", capsys.readouterr().out, re.MULTILINE)
    assert {decoder for decoder, _ in written} == set(OPTIONS)
    assert all(len(text) > 10 for _, text in written)
    assert re.match(r"'(Yea|Nay), ", written[1][1])


@pytest.mark.parametrize("command", COMMANDS.splitlines())
def test_the_commands_write(folder, command, capsys):
    program, *arguments = [next(filter(None, part)) for part in re.findall(r'"([^"]*)"|(\S+)', command)]
    assert program == "lmtutorial"
    assert main([*arguments, "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.strip()) > 20


def test_the_server_answers_the_client_with_each_decoder(folder, capsys):
    """Takes 20 seconds: a server of its own, and a client that reads the system's certificates."""
    arguments = [*SERVE.split()[1:], "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-m", "lmtutorial.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    try:
        assert server.stdout is not None
        [url] = re.findall(r"http://[\d.:]+/v1", server.stdout.readline())
        assert CLIENT.count("http://127.0.0.1:8000/v1") == 1
        exec(compile(CLIENT.replace("http://127.0.0.1:8000/v1", url), "decoders.md", "exec"), {})
    finally:
        server.terminate()
        server.wait(30)
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 6
    assert re.search(r"\} '(Yea|Nay), ", answers[1])
