"""Laws of the command line: what it writes it can read, and bad input ends in one clear line and code 2."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from lmtutorial.batches import SlidingWindows, StreamBatches
from lmtutorial.checkpoint import load_model
from lmtutorial.cli import _share, main
from lmtutorial.corpora import load_corpus
from lmtutorial.decoders import Decoding
from lmtutorial.metrics import evaluate
from lmtutorial.tokenizers import load_tokenizer
from lmtutorial.train import TrainConfig

WORDS = ["the", "king", "is", "dead", "long", "live", "queen", "and", "fool", "sings\n"]
SMALL = ["--width", "16", "--batch", "4", "--time", "16", "--device", "cpu", "--max-seconds", "None"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of random sentences, in a folder with a space in its name."""
    path = tmp_path_factory.mktemp("my texts") / "kings and fools.txt"
    rng = random.Random(0)
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(3000)))
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A folder with a small trained model."""
    out = tmp_path_factory.mktemp("runs") / "a run"
    flags = ["--corpus", str(text), "--tokenizer", "char", "--steps", "60", "--eval-every", "30", *SMALL]
    assert main(["train", *flags, "--learning-rate", "0.02", "--out", str(out)]) == 0
    return out


def numbers(line):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_a_run_leaves_a_model_a_tokenizer_its_flags_and_a_log(run):
    names = {"best.safetensors", "last.safetensors", "tokenizer.json", "command.json", "log.jsonl"}
    assert set(os.listdir(run)) == names
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60
    assert rows[-1]["validation_loss"] < rows[0]["train_loss"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_evaluate_prints_what_the_library_computes(run, text, split, capsys):
    assert main(["evaluate", "--checkpoint", str(run), "--split", split, "--device", "cpu"]) == 0
    printed = numbers(capsys.readouterr().out.split(f"{split}:")[1])
    tokenizer = load_tokenizer(run / "tokenizer.json")
    tokens = tokenizer.encode_array(load_corpus(text).text(split))
    result = evaluate(
        load_model(run / "best.safetensors"), StreamBatches(tokens, 8, 256), token_bytes=tokenizer.token_bytes
    )
    expected = [result.loss, result.perplexity, result.bits_per_byte, result.tokens, result.bytes]
    assert printed == pytest.approx(expected, abs=0.006)


def test_generate_continues_the_prompt_and_the_seed_decides(run, capsys):
    def generated(*flags):
        fixed = ["--checkpoint", str(run), "--prompt", "the ", "--max-new-tokens", "40"]
        assert main(["generate", *fixed, *flags]) == 0
        return capsys.readouterr().out

    first = generated("--seed", "1", "--samples", "2")
    texts = first.split("-" * 72 + "\n")
    assert len(texts) == 2
    assert texts[0] != texts[1]
    assert all(text.startswith("the ") for text in texts)
    assert generated("--seed", "1", "--samples", "2") == first != generated("--seed", "2", "--samples", "2")
    greedy = [generated("--temperature", "0", "--samples", "1", "--seed", seed) for seed in "12"]
    assert greedy[0] == greedy[1]


def test_generate_writes_with_each_decoder_what_its_options_say(run, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text("def kings(text):\n    return text.count('king')\n")
    model, tokenizer = load_model(run / "best.safetensors"), load_tokenizer(run / "tokenizer.json")
    prompt, reward = tokenizer.encode("the "), ["--reward", f"{tmp_path / 'rewards.py'}:kings"]
    for decoder, flags, options in [
        ("beam", ["--width", "3"], {"width": 3}),
        ("mcts", ["--simulations", "3", *reward], {"simulations": 3}),
        ("best_of", ["--tries", "3", *reward], {"tries": 3}),
        ("speculative", ["--lookahead", "2", "--draft", str(run)], {"lookahead": 2}),
        ("sample", ["--match", "(king|fool).*"], {"match": "(king|fool).*"}),
    ]:
        if decoder != "beam":
            flags, options = [*flags, "--seed", "1"], {**options, "seed": 1, "temperature": 0.8}
        command = [
            "generate",
            "--checkpoint",
            str(run),
            "--device",
            "cpu",
            "--prompt",
            "the ",
            "--samples",
            "2",
        ]
        assert main([*command, "--max-new-tokens", "20", "--decoder", decoder, *flags]) == 0
        printed = capsys.readouterr()
        texts = Decoding(decoder, **options).write(
            model, tokenizer, prompt, 20, 2, draft=model, reward=lambda text: text.count("king")
        )
        written = [("the " + tokenizer.decode(text.tokens)).strip("\n") for text in texts]
        assert printed.out == f"\n{'-' * 72}\n".join(written) + "\n"
        assert ("100% accepted" in printed.err) == (decoder == "speculative")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decoder", "beam", "--seed", "3"], "seed is for the decoders sample, .*, not for beam"),
        (
            ["--decoder", "beam", "--reward", "x.py:f"],
            "reward is for the decoders best_of, mcts, not for beam",
        ),
        (["--draft", "gpt2"], "draft is for the decoder speculative, not for sample"),
        (["--decoder", "mcts"], "needs a reward: generate or serve with --reward FILE.py:FUNCTION"),
        (["--samples", "0"], "samples is 0; it must be at least 1"),
        (["--decoder", "beam", "--samples", "6"], "n_best is 6; it must be from 1 to width, which is 4"),
        (["--match", "(a"], "match: .* is no regular expression"),
    ],
)
def test_generate_refuses_what_a_decoder_has_no_use_for(run, flags, message, capsys):
    assert main(["generate", "--checkpoint", str(run), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_generate_works_in_a_fresh_process_from_the_folder_alone(run):
    flags = ["generate", "--checkpoint", str(run), "--prompt", "live ", "--samples", "1", "--seed", "3"]
    output = subprocess.run(
        [sys.executable, "-m", "lmtutorial.cli", *flags], capture_output=True, text=True, check=True, cwd="/"
    )
    assert output.stdout.startswith("live ")
    assert len(output.stdout) > 100
    assert output.stderr == ""


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_every_tokenizer_trains_and_writes(text, tmp_path, tokenizer, capsys):
    flags = ["--corpus", str(text), "--tokenizer", tokenizer, "--vocab-size", "300", "--steps", "4", *SMALL]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "the king"]) == 0
    assert capsys.readouterr().out.startswith("the king")


@pytest.mark.parametrize("kind", ["gpt2", "modern"])
def test_a_transformer_trains_stops_goes_on_is_measured_and_writes(text, tmp_path, kind, capsys):
    out = str(tmp_path / "run")
    flags = ["--model", kind, "--corpus", str(text), "--tokenizer", "char", "--layers", "2", *SMALL]
    assert main(["train", *flags, "--steps", "20", "--learning-rate", "0.01", "--out", out]) == 0
    assert main(["train", "--resume", out, "--steps", "40"]) == 0
    trained = load_model(f"{out}/best.safetensors")
    assert (trained.config.position, trained.context) == ("learned" if kind == "gpt2" else "rotary", 16)
    stored = json.loads((tmp_path / "run" / "command.json").read_text())["training"]
    assert stored["optimizer"] == ("adamw" if kind == "gpt2" else "muon")
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", out, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    windows = SlidingWindows(tokenizer.encode_array(load_corpus(text).text("validation")), 4, 16, 8)
    assert f"loss {evaluate(trained, windows).loss:.3f} nats per token" in printed
    assert "each after 8 to 16 tokens" in printed
    assert main(["generate", "--checkpoint", out, "--prompt", "the king", "--samples", "1"]) == 0
    assert capsys.readouterr().out.startswith("the king")


def test_a_model_is_found_by_name_and_an_unknown_name_is_answered_with_those_like_it(capsys):
    flags = ["--prompt", "KING.", "--samples", "1", "--max-new-tokens", "5", "--seed", "0"]
    assert main(["generate", "--checkpoint", "shakespeare-draft", *flags]) == 0
    assert capsys.readouterr().out.startswith("KING.")
    assert "Did you mean 'shakespeare-draft'" in failing(
        capsys, "generate", "--checkpoint", "shakespear-draft"
    )


@pytest.mark.parametrize(
    ("limits", "share"),
    [
        ({"steps": 100}, 0.25),
        ({"max_seconds": 50.0}, 0.5),
        ({"max_tokens": 4000}, 0.5),
        ({"steps": 100, "max_tokens": 2500}, 0.8),
        ({"max_seconds": 5.0}, 1.0),
    ],
)
def test_the_bar_fills_by_the_limit_that_is_nearest(limits, share):
    row = {"step": 25, "seconds": 25.0}
    assert _share(TrainConfig(**{"steps": None, **limits}), row, batch_tokens=80) == pytest.approx(share)


def test_corpora_lists_every_name(capsys):
    assert main(["corpora"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("shakespeare", "tiny_shakespeare", "python_docs", "wikitext-2"))


def test_resuming_with_more_steps_equals_one_long_run(text, tmp_path, capsys):
    flags = ["--corpus", str(text), "--tokenizer", "char", "--dropout", "0.2", *SMALL]
    flags += ["--schedule", "constant"]
    assert main(["train", *flags, "--steps", "20", "--out", str(tmp_path / "long")]) == 0
    assert main(["train", *flags, "--steps", "10", "--out", str(tmp_path / "short")]) == 0
    assert main(["train", "--resume", str(tmp_path / "short"), "--steps", "20"]) == 0
    a, b = (load_model(tmp_path / name / "last.safetensors").state_dict() for name in ("long", "short"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert main(["train", "--resume", str(tmp_path / "short")]) == 0
    assert "nothing was left to do" in capsys.readouterr().out


CHILD = """
import sys, torch
torch.set_num_threads(1)
from lmtutorial.cli import _share, main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_saves_prints_how_to_go_on_and_that_command_works(text, tmp_path, capsys):
    out = tmp_path / "a run"
    flags = ["--corpus", str(text), "--tokenizer", "char", "--steps", "100000", "--eval-every", "5", *SMALL]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "train", *flags, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    while not child.stdout.readline().startswith("step"):
        assert child.poll() is None, child.communicate()
    child.send_signal(signal.SIGINT)
    printed, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in errors
    command = shlex.split(printed.splitlines()[-1].removeprefix("go on with:"))
    step = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert command[:2] == ["lmtutorial", "train"]
    assert main([*command[1:], "--steps", str(step + 20)]) == 0
    assert "stopped: all steps are done" in capsys.readouterr().out
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == step + 20


def failing(capsys, *arguments):
    """The one line that a failing command prints."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    return printed.err


def test_bad_input_ends_in_one_clear_line_and_code_2(run, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    train = ("train", "--corpus", text, "--tokenizer", "char", "--device", "cpu", "--out", tmp_path / "new")
    assert "shakespear" in failing(capsys, *train, "--corpus", "shakespear")
    assert "'gpu'; it must be auto or one of: cpu" in failing(capsys, *train, "--device", "gpu")
    assert "out is None" in failing(capsys, *train, "--out", "None")
    assert "batch is 0" in failing(capsys, *train, "--batch", "0")
    assert "vocab_size is 7" in failing(capsys, *train, "--tokenizer", "bpe", "--vocab-size", "7")
    assert "holds a run already; go on with it (--resume '" in failing(capsys, *train, "--out", run)
    assert "holds no run" in failing(capsys, "train", "--resume", tmp_path)
    assert "name one: --checkpoint shakespeare" in failing(capsys, "generate", "--checkpoint", "no/where")
    assert "max_len is 0; it must be" in failing(capsys, "serve", "--checkpoint", run, "--max-len", "0")
    assert "port is 99999" in failing(capsys, "serve", "--checkpoint", run, "--port", "99999")
    assert "holds no best.safetensors" in failing(capsys, "evaluate", "--checkpoint", tmp_path)
    assert "temperature" in failing(capsys, "generate", "--checkpoint", run, "--temperature", "-1")
    assert "samples is 0" in failing(capsys, "generate", "--checkpoint", run, "--samples", "0")
    assert "prompt" in failing(capsys, "generate", "--checkpoint", run, "--prompt", "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags", [["--steps", "0"], ["--learning-rate", "-1"], ["--dropout", "1.5"], ["--wdth", "3"]]
)
def test_flags_that_cannot_be_are_refused_before_any_work(flags, text, tmp_path, capsys):
    try:
        code = main(["train", "--corpus", str(text), *flags, "--out", str(tmp_path / "new")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr()
    assert flags[0].removeprefix("--").replace("-", "_")[:4] in (printed.err + printed.out).replace("-", "_")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "new").exists()


def test_a_damaged_folder_is_named(run, tmp_path, capsys):
    (tmp_path / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes())
    assert "there is no tokenizer beside" in failing(capsys, "generate", "--checkpoint", tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert "tokenizer.json is not a tokenizer" in failing(capsys, "generate", "--checkpoint", tmp_path)
    (tmp_path / "best.safetensors").write_bytes(b"PK\x03\x04")
    assert "is damaged, or no safetensors file" in failing(capsys, "generate", "--checkpoint", tmp_path)
    (tmp_path / "command.json").write_text("{}")
    assert "does not hold the flags of a run" in failing(capsys, "train", "--resume", tmp_path)


def test_training_that_diverges_ends_with_code_1_and_advice(text, tmp_path, capsys):
    flags = ["--corpus", str(text), "--tokenizer", "char", "--steps", "500", "--clip", "None", *SMALL]
    code = main(["train", *flags, "--learning-rate", "1e36", "--warmup", "0", "--out", str(tmp_path / "run")])
    assert code == 1
    assert "a lower learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["generate"], ["serve"], ["corpora"]])
def test_help_exits_with_0_and_explains_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert ">>>" not in printed
    if command == ["train"]:
        flags = ("--corpus", "--width", "--learning-rate", "--resume", "--out")
        assert all(flag in printed for flag in flags)


def test_fast_steps_write_the_same_and_rounded_weights_about_the_same(capsys):
    flags = ["--checkpoint", "shakespeare", "--prompt", "ROMEO.", "--samples", "2", "--max-new-tokens", "20"]
    written = []
    for more in ([], ["--fast"], ["--bits", "8"], ["--bits", "8", "--fast"]):
        assert main(["generate", *flags, "--temperature", "0", "--device", "cpu", *more]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert written[2] == written[3]
    assert all(text.startswith("ROMEO.") for text in written)


def test_a_model_that_cannot_be_rounded_is_named(run, capsys):
    assert main(["generate", "--checkpoint", str(run), "--bits", "8"]) == 2
    assert "--bits and --fast are for a Transformer, this model is LSTM" in capsys.readouterr().err
