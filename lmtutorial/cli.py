"""The command line: `lmtutorial train | evaluate | generate | serve | corpora | repro`. Only this prints."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

# Before torch is loaded: how long its threads spin before they sleep. With the default of 300,000 turns,
# training was 17 times slower beside two busy programs, a tenth faster alone: benchmarks/thread_waits.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import tyro
from tqdm.auto import tqdm

from lmtutorial.build import build_batches, build_model, build_tokenizer, held_out_batches
from lmtutorial.checkpoint import find_checkpoint, load_model
from lmtutorial.commands import (
    DEFAULTS,
    WRITING,
    Corpora,
    Evaluate,
    Generate,
    Repro,
    Serve,
    Train,
    store,
    stored,
)
from lmtutorial.compiled import compiled
from lmtutorial.corpora import DownloadError, list_corpora, load_corpus
from lmtutorial.decode.speculative import Speculation
from lmtutorial.decoders import read_draft, read_reward
from lmtutorial.devices import choose_device
from lmtutorial.distributed import Processes, process_group
from lmtutorial.engine import Engine
from lmtutorial.ledger import read_results, record
from lmtutorial.lost_process import ProcessLostError
from lmtutorial.metrics import Evaluation, evaluate
from lmtutorial.models.cache import LanguageModel
from lmtutorial.models.transformer import Transformer
from lmtutorial.native import native
from lmtutorial.pretrained import load_pretrained
from lmtutorial.quantize import quantize
from lmtutorial.repro import RECIPES, beside, reproduce
from lmtutorial.tokenizers import Tokenizer, load_tokenizer
from lmtutorial.train import TrainConfig, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if training diverged, 2 for bad input, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        command = _parse(arguments)
        return _COMMANDS[type(command)](command)
    except (FloatingPointError, ProcessLostError) as error:
        return _fail(error, 1)
    except (ValueError, OSError, DownloadError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("lmtutorial: interrupted", file=sys.stderr)
        return 130


def _fail(error: Exception, code: int) -> int:
    print(f"lmtutorial: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> Train | Evaluate | Generate | Serve | Corpora | Repro:
    """The command. The defaults of `train` are those of the model's kind, or of the run that is resumed."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--resume", type=Path)
    before.add_argument("--model")
    first, _ = before.parse_known_args(arguments)
    default = DEFAULTS.get(first.model, Train()) if first.resume is None else stored(first.resume)
    commands: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=default)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Serve, tyro.conf.subcommand("serve")]
        | Annotated[Corpora, tyro.conf.subcommand("corpora")]
        | Annotated[Repro, tyro.conf.subcommand("repro")]
    )
    command: Train | Evaluate | Generate | Serve | Corpora | Repro = tyro.cli(
        commands,
        prog="lmtutorial",
        description="Train small language models, measure them, and write with them.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return command


def _train(command: Train) -> int:
    with process_group() as processes:
        return _train_in(processes, command)


def _train_in(processes: Processes, command: Train) -> int:
    """All processes train; the first alone prints, writes the other files, and measures the result."""
    out, device = _folder(command), choose_device(command.device)
    if processes.size > 1 and device.index is not None:
        raise ValueError(
            f"device is {command.device!r} for {processes.size} processes; say cuda, for one each"
        )
    corpus = load_corpus(command.corpus)
    if command.resume is None:
        tokenizer = build_tokenizer(command, corpus)
    else:
        tokenizer = load_tokenizer(command.resume / "tokenizer.json")
    tokens = tokenizer.encode_array(corpus.text("train"))
    torch.manual_seed(command.training.seed)
    model = build_model(command, tokenizer.vocab_size).to(device)
    batches = build_batches(command, tokens)
    held_out = held_out_batches(model, tokenizer.encode_array(corpus.text("validation")))
    parameters = sum(p.numel() for p in model.parameters())
    if processes.rank == 0:
        several = f", in {processes.size} processes" if processes.size > 1 else ""
        print(
            f"{corpus.name}: {len(tokens):,} tokens to train on, {len(held_out.tokens):,} to validate, "
            f"{tokenizer.vocab_size:,} kinds ({tokenizer.kind}); "
            f"{command.model} of {parameters:,} parameters on {device}{several}",
            flush=True,
        )
        out.mkdir(parents=True, exist_ok=True)
        if out != command.resume:  # where another process may be reading it
            tokenizer.save(out / "tokenizer.json")
        store(command, out)
    settings = command.training
    with _bar(settings, command.batch * command.time, shown=processes.rank == 0) as on_log:
        history = train(model, batches, settings, validation=held_out, on_log=on_log, resume=command.resume)
    if processes.rank:
        return 130 if history.stopped == "interrupted" else 0
    print(f"stopped: {_WHY[history.stopped]}")
    if history.stopped == "interrupted":
        print(f"go on with:  lmtutorial train --resume {shlex.quote(str(out))}")
        return 130
    best = load_model(find_checkpoint(out, "best", "last"), device)
    print(f"validation: {_describe(evaluate(best, held_out, token_bytes=tokenizer.token_bytes), best)}")
    print(f"write with it:  lmtutorial generate --checkpoint {shlex.quote(str(out))}")
    return 0


def _folder(command: Train) -> Path:
    """Where the run goes, if it may."""
    out = command.training.out
    if out is None:
        raise ValueError("out is None; give a folder to keep the model in, for example --out runs/demo")
    if command.resume is None and not command.overwrite and (out / "last.safetensors").exists():
        raise ValueError(
            f"{out} holds a run already; go on with it (--resume {shlex.quote(str(out))}), replace it "
            "(--overwrite), or choose another folder (--out)"
        )
    return out


_WHY = {
    "steps": "all steps are done (--steps)",
    "time": "the time is up (--max-seconds)",
    "tokens": "all tokens are read (--max-tokens)",
    "patience": "the validation loss no longer falls (--patience)",
    "interrupted": "Ctrl-C; all is saved",
    "": "nothing was left to do; more --steps or --max-seconds would go on",
}


def _evaluate(command: Evaluate) -> int:
    model, tokenizer, folder = _load(command.checkpoint, command.device)
    trained_on = stored(folder).corpus if folder and not command.corpus else "shakespeare"
    corpus = load_corpus(command.corpus or trained_on)
    tokens = tokenizer.encode_array(corpus.text(command.split))
    result = evaluate(model, held_out_batches(model, tokens), token_bytes=tokenizer.token_bytes)
    print(f"{corpus.name}, {command.split}: {_describe(result, model)}")
    return 0


def _generate(command: Generate) -> int:
    if command.samples < 1:
        raise ValueError(f"samples is {command.samples}; it must be at least 1")
    decoding = command.decoding
    decoding.check(_given(command) | _given(decoding, WRITING))
    load = _loader(command)
    model, tokenizer = load(command.checkpoint)
    prompt = tokenizer.encode(command.prompt)
    length = command.max_new_tokens
    if model.context is not None and len(prompt) < model.context:
        length = min(length, model.context - len(prompt))
    n = command.samples
    if decoding.decoder == "beam" and "samples" not in _given(command):
        n = min(n, decoding.width)
    report = Speculation()
    texts = decoding.write(
        model, tokenizer, prompt, length, n,
        draft=read_draft(command.draft, tokenizer, load) if decoding.decoder == "speculative" else None,
        reward=None if command.reward is None else read_reward(command.reward),
        report=report,
    )  # fmt: skip
    for number, text in enumerate(texts):
        print("-" * 72 if number else "", end="\n" if number else "")
        print((command.prompt + tokenizer.decode(text.tokens)).strip("\n"))
    if decoding.decoder == "speculative":
        accepted = f"{report.acceptance_rate:.0%} accepted"
        print(f"({report.calls} forwards, {report.calls_saved} saved; {accepted})", file=sys.stderr)
    return 0


def _serve(command: Serve) -> int:
    try:
        from lmtutorial.serve import Server
    except ImportError as error:
        raise ValueError(
            f"serving needs fastapi and uvicorn ({error}): pip install fastapi uvicorn"
        ) from None
    load = _loader(command)
    model, tokenizer = load(command.checkpoint)
    max_len = (model.context or 1024) if command.max_len is None else command.max_len
    engine = Engine(
        model, command.rows, max_len=max_len, queue=command.queue, keep=command.keep, tokenizer=tokenizer
    )
    name = command.name or Path(command.checkpoint).name
    server = Server(
        engine, name, host=command.host, port=command.port, max_body=command.max_body, grace=command.grace,
        draft=read_draft(command.draft, tokenizer, load),
        reward=None if command.reward is None else read_reward(command.reward),
    )  # fmt: skip
    print(f"{name} at {server.url}/v1, {command.rows} texts of {max_len:,} tokens side by side", flush=True)
    if not server.local:
        print("anyone who reaches this address may use it, unencrypted", flush=True)
    with suppress(KeyboardInterrupt):
        server.run()
    return 0


def _corpora(command: Corpora) -> int:
    for info in list_corpora():
        where = "here" if info.present else f"{info.bytes / 1e6:.1f} MB to fetch"
        use = "" if info.loadable else "  (files only)"
        print(f"{info.name:18} {where:18} {info.license}\n    {info.description}{use}")
    return 0


def _given(flags: Any, default: Any = None) -> set[str]:
    """The flags that differ from their defaults."""
    default = type(flags)() if default is None else default
    names = [field.name for field in dataclasses.fields(flags)]
    return {name for name in names if getattr(flags, name) != getattr(default, name)}


def _loader(command: Generate | Serve) -> Callable[[str], tuple[LanguageModel, Tokenizer]]:
    """From a name to a model and its tokenizer, made ready as the command asks."""

    def load(name: str) -> tuple[LanguageModel, Tokenizer]:
        model, tokenizer, _ = _load(name, command.device)
        return _ready(model, command.bits, command.fast), tokenizer

    return load


def _load(checkpoint: str, device: str) -> tuple[LanguageModel, Tokenizer, Path | None]:
    """A model, its tokenizer, and the folder of its run; None for a model that is known by name."""
    if not Path(checkpoint).exists() and ("/" not in checkpoint or checkpoint.startswith("hub:")):
        model, tokenizer, _ = load_pretrained(checkpoint, device)
        return model, tokenizer, None
    try:
        path = find_checkpoint(checkpoint, "best", "last")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; train a model, or name one: --checkpoint shakespeare") from None
    beside = path.parent / "tokenizer.json"
    if not beside.is_file():
        raise FileNotFoundError(f"there is no tokenizer beside {path}: {beside} is missing")
    model = load_model(path, choose_device(device))
    return model, load_tokenizer(beside), path.parent


def _ready(model: LanguageModel, bits: Literal[4, 8] | None, fast: bool) -> LanguageModel:
    """The model with its weights rounded and its steps compiled, as a command asks for."""
    if bits is None and not fast:
        return model
    if not isinstance(model, Transformer):
        raise ValueError(f"--bits and --fast are for a Transformer, this model is {type(model).__name__}")
    model = model if bits is None else quantize(model, bits)
    return model if not fast else native(model) if model.device.type == "cpu" else compiled(model)


def _describe(result: Evaluation, model: LanguageModel) -> str:
    context = "" if model.context is None else f", each after {model.context // 2} to {model.context} tokens"
    return (
        f"loss {result.loss:.3f} nats per token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.3f} bits per byte "
        f"({result.tokens:,} tokens, {result.bytes:,} bytes{context})"
    )


def _repro(command: Repro) -> int:
    stored_results = read_results()
    if command.id is None:
        for name, recipe in RECIPES.items():
            print(f"{name}\n    {recipe.what}\n    {beside(name, stored_results.get(name))}")
        return 0
    values, seeds, seconds = reproduce(
        command.id, command.seeds, lambda seed, value: print(f"seed {seed}: {value:.4f}", flush=True)
    )
    recipe = RECIPES[command.id]
    print(f"{command.id}: {statistics.fmean(values):.4f} {recipe.unit}, {seconds:.0f} s a seed")
    print(f"stored: {beside(command.id, stored_results.get(command.id))}")
    if command.record:
        record(command.id, values, seeds, unit=recipe.unit, config=recipe.config, seconds=seconds)
    return 0


@contextmanager
def _bar(config: TrainConfig, batch_tokens: int, shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar, off when the output is no terminal, and a line at each look at the validation text."""
    off = None if shown else True  # None: where the output is no terminal
    with tqdm(total=100, disable=off, bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:

        def on_log(row: dict[str, Any]) -> None:
            bar.update(100 * _share(config, row, batch_tokens) - bar.n)
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
            if row["validation_loss"] is not None:
                bar.write(
                    f"step {row['step']:6,}  {row['seconds']:5.0f} s  training loss {row['train_loss']:.3f}  "
                    f"validation loss {row['validation_loss']:.3f}"
                )

        yield on_log


def _share(config: TrainConfig, row: dict[str, Any], batch_tokens: int) -> float:
    """How much of a run is done, from 0 to 1, by the limit that is nearest."""
    tokens = row["step"] * config.accumulation * batch_tokens
    limits = (row["step"], config.steps), (row["seconds"], config.max_seconds), (tokens, config.max_tokens)
    shares = [float(done / limit) for done, limit in limits if limit is not None]
    return min(1.0, max(shares))


_COMMANDS: dict[type[Any], Callable[[Any], int]] = {
    Train: _train,
    Evaluate: _evaluate,
    Generate: _generate,
    Serve: _serve,
    Corpora: _corpora,
    Repro: _repro,
}

if __name__ == "__main__":
    sys.exit(main())
