"""Train a model that the package ships, and put it there: `python tools/ship.py shakespeare`.

Runs the command below, takes the best weights of the run, rounds them to bfloat16, measures them as they will
be loaded, and writes `lmtutorial/weights/NAME` with the tokenizer and a model card. With `--trained` the run
is taken as it is.
"""

import argparse
import shlex
from pathlib import Path

from lmtutorial.batches import SlidingWindows, StreamBatches
from lmtutorial.build import held_out_batches
from lmtutorial.checkpoint import find_checkpoint, load_model
from lmtutorial.cli import main as lmtutorial
from lmtutorial.corpora import load_corpus
from lmtutorial.metrics import evaluate
from lmtutorial.pretrained import SHIPPED, load_pretrained, save_pretrained
from lmtutorial.provenance import processor
from lmtutorial.tensorfile import read_tree
from lmtutorial.tokenizers import load_tokenizer

SHARED = "--corpus shakespeare --vocab-size 2048 --max-seconds None --max-tokens 6000000"
COMMANDS = {
    "shakespeare": f"{SHARED} --model modern --time 512 --batch 4 --width 256 --layers 6 --heads 4 "
    "--kv-heads 2 --dropout 0.1 --learning-rate 0.01 --eval-every 500",
    "shakespeare-draft": f"{SHARED} --model modern --time 512 --batch 4 --width 96 --layers 2 --heads 3 "
    "--kv-heads 1 --learning-rate 0.015 --eval-every 1000",
    "shakespeare-lstm": f"{SHARED} --model lstm --width 384 --batch 32 --time 64 --dropout 0.1 "
    "--schedule linear --floor 0 --learning-rate 0.005 --eval-every 1000",
}
TITLES = {
    "shakespeare": "A Transformer that writes like Shakespeare",
    "shakespeare-draft": "A small Transformer that writes like Shakespeare, to draft for a larger one",
    "shakespeare-lstm": "An LSTM that writes like Shakespeare",
}
KINDS = {
    "lstm": "An LSTM",
    "modern": "A Transformer with rotary positions, RMSNorm, SwiGLU, shared keys and values, and QK-norm",
}
CARD = """# {title}

{kind}: {parameters:,} parameters, trained for the book on the plays and poems of Shakespeare.

| part of the text | nats per token | perplexity | bits per byte |
|---|---|---|---|
{losses}

Measured on the weights as they lie here, in bfloat16, computed in float32. {context}

- **Data**: the corpus `shakespeare` (`lmtutorial corpora`): works in the public domain, in an edition under
  CC BY 2.5, split by whole works. The tokenizer is byte-pair encoding with {vocab:,} tokens, learned from the
  training part; all models that `tools/ship.py` trains have the same.
- **Training**: `lmtutorial train {command}`, which `tools/ship.py` runs.
- **Hardware**: {hardware}; {tokens:,} target tokens in {updates:,} updates.
- **Use**: `load_pretrained("{name}")`. It writes what looks like Shakespeare's verse and means little. It is
  for learning how language models work, not for anything that people rely on.
- **License**: MIT, like the code.
"""


def main() -> None:
    """Train, measure and write one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(COMMANDS))
    parser.add_argument("--trained", action="store_true", help="take runs/NAME as it is")
    parser.add_argument("--hardware", default=f"CPU, {processor()}")
    options = parser.parse_args()
    run = Path("runs") / options.name
    if not options.trained:
        lmtutorial(["train", *shlex.split(COMMANDS[options.name]), "--out", str(run), "--overwrite"])
    tokenizer = load_tokenizer(run / "tokenizer.json")
    trained = load_model(find_checkpoint(run, "best"))
    folder = save_pretrained(SHIPPED / options.name, trained, tokenizer, f"# {TITLES[options.name]}\n")
    (folder / "README.md").write_text(card(options.name, run, options.hardware), encoding="utf-8")
    print((folder / "README.md").read_text(encoding="utf-8"))


def card(name: str, run: Path, hardware: str) -> str:
    """The model card: what the weights in the package reach, and how they were made."""
    model, tokenizer, _ = load_pretrained(name)
    state = read_tree(run / "last.safetensors")["state"]
    losses = [f"| {split} | {losses_on(name, split)} |" for split in ("train", "validation", "test")]
    half = None if model.context is None else model.context // 2
    return CARD.format(
        title=TITLES[name],
        kind=KINDS["lstm" if half is None else "modern"],
        parameters=sum(p.numel() for p in model.parameters()),  # type: ignore[attr-defined]
        losses="\n".join(losses),
        context="Its state is carried along the text."
        if half is None
        else f"Each token is predicted from the {half} to {2 * half} before it, where there are as many.",
        vocab=tokenizer.vocab_size,
        command=COMMANDS[name],
        hardware=hardware,
        tokens=state["all_tokens"],
        updates=state["step"],
        name=name,
    )


def losses_on(name: str, split: str) -> str:
    """Loss, perplexity and bits per byte of one part of the text, as cells of a table."""
    model, tokenizer, _ = load_pretrained(name)
    tokens = tokenizer.encode_array(load_corpus("shakespeare").text(split))
    if split == "train":
        tokens = tokens[:200_000]  # the first works: enough to show the gap
    batches: StreamBatches | SlidingWindows = held_out_batches(model, tokens)
    result = evaluate(model, batches, token_bytes=tokenizer.token_bytes)
    return f"{result.loss:.3f} | {result.perplexity:.1f} | {result.bits_per_byte:.3f}"


if __name__ == "__main__":
    main()
