"""The landing page's figure and samples, from one real training run: python tools/landing.py

Trains the LSTM of `lmtutorial train` on Shakespeare for a fixed number of updates, measures it on plays
that it never saw, and lets it write from the same prompt and seed at three moments. Writes in book/_static:
landing-light.png, landing-dark.png, landing.txt (included by the page) and landing.json (the numbers).
"""

import json
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt

from lmtutorial import plots
from lmtutorial.batches import StreamBatches
from lmtutorial.commands import Train
from lmtutorial.corpora import load_corpus
from lmtutorial.decode.sampling import sample
from lmtutorial.metrics import evaluate
from lmtutorial.models.lstm import LSTM
from lmtutorial.models.ngram import NGram
from lmtutorial.tokenizers import BPETokenizer, Tokenizer
from lmtutorial.train import train

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"
STEPS = 2000
MEASURED = 60_000  # tokens of the unseen plays, for the curve and for the n-gram model alike
MOMENTS = (0, 100, STEPS)
PROMPT, SEED, TOKENS = "KING.\n", 4, 48
DARK = {
    "figure.facecolor": "#12171d",
    "savefig.facecolor": "#12171d",
    "axes.facecolor": "#12171d",
    "axes.edgecolor": "#8b949e",
    "axes.labelcolor": "#e6edf3",
    "axes.titlecolor": "#e6edf3",
    "grid.color": "#2b333c",
    "text.color": "#e6edf3",
    "xtick.color": "#c3ccd5",
    "ytick.color": "#c3ccd5",
}


def run() -> dict[str, Any]:
    """Train, measure, and write; everything that the page says, as numbers and texts."""
    defaults = Train()
    corpus = load_corpus(defaults.corpus)
    tokenizer = BPETokenizer.train(corpus.text("train"), vocab_size=defaults.lstm.vocab_size)
    tokens, held_out = (tokenizer.encode_array(corpus.text(split)) for split in ("train", "validation"))
    held_out = held_out[:MEASURED]
    validation = StreamBatches(held_out, batch=8, time=256)
    scale = len(held_out) / (math.log(2) * int(tokenizer.token_bytes[held_out].sum()))

    torch.manual_seed(0)
    model = LSTM(replace(defaults.lstm, vocab_size=tokenizer.vocab_size))
    samples = {0: write(model, tokenizer)}
    curve = [(0, evaluate(model, validation).loss * scale)]

    def look(row: dict[str, Any]) -> None:
        if row["validation_loss"] is not None:
            curve.append((row["step"], row["validation_loss"] * scale))
        if row["step"] in MOMENTS:
            samples[row["step"]] = write(model, tokenizer)

    settings = replace(
        defaults.training, steps=STEPS, max_seconds=None, eval_every=100, log_every=100, out=None
    )
    batches = StreamBatches(tokens, defaults.batch, defaults.time)
    train(model, batches, settings, validation=validation, on_log=look)
    orders = {order: ngram_bits(tokens, held_out, order, tokenizer, scale) for order in (3, 4, 5)}
    best = min(orders, key=orders.__getitem__)
    return {
        "curve": curve,
        "samples": samples,
        "ngram": {"order": best, "bits_per_byte": orders[best]},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def ngram_bits(tokens: Any, held_out: Any, order: int, tokenizer: Tokenizer, scale: float) -> float:
    """Bits per byte of the n-gram model of that order, on the same tokens."""
    return float(np.mean(NGram.train(tokens, order, tokenizer.vocab_size).score(held_out))) * scale


def write(model: LSTM, tokenizer: Tokenizer) -> str:
    """What the model writes now, from the same prompt and seed each time."""
    prompt = tokenizer.encode(PROMPT)
    generated = sample(model, [prompt], TOKENS, temperature=0.7, seed=SEED)[0]
    return PROMPT + tokenizer.decode(generated.tokens)


def draw(result: dict[str, Any], name: str, look: dict[str, str]) -> None:
    """The learning curve against the n-gram model, as a picture for pages of one brightness."""
    plots.style()
    with mpl.rc_context(look):
        figure, ax = plt.subplots(figsize=(6.4, 3.3))
        ax.set(xlabel="updates of the weights", ylabel="bits per byte, unseen plays", ylim=(1.5, 4.5))
        steps, bits = zip(*result["curve"], strict=True)
        rival = result["ngram"]
        ax.plot(steps, bits, color="#7cc4f0" if look else plots.BLUE, linestyle="-", linewidth=3)
        ax.axhline(rival["bits_per_byte"], color=plots.ORANGE, linestyle="--", linewidth=2.2)
        over, under = {"va": "bottom", "ha": "right"}, {"va": "top", "ha": "right"}
        first, second = (under, over) if bits[-1] < rival["bits_per_byte"] else (over, under)
        ax.text(steps[-1], bits[-1] + (0.1 if first is over else -0.1), f"LSTM {bits[-1]:.2f}", **first)
        text = f"{rival['order']}-gram model {rival['bits_per_byte']:.2f}"
        ax.text(steps[-1], rival["bits_per_byte"] + (0.1 if second is over else -0.1), text, **second)
        (STATIC / f"landing-{name}.png").write_bytes(plots.png(figure))
        plt.close(figure)


def page(result: dict[str, Any]) -> str:
    """The part of the landing page that shows the run."""
    steps, bits = result["curve"][-1]
    rival = result["ngram"]
    alt = (
        f"Line chart: bits per byte of unseen plays by updates of the weights. The LSTM falls from "
        f"{result['curve'][0][1]:.2f} to {bits:.2f} in {steps:,} updates; the dashed line of the "
        f"{rival['order']}-gram model is at {rival['bits_per_byte']:.2f}."
    )
    better = "predicts better than" if bits < rival["bits_per_byte"] else "does not yet reach"
    cards = []
    for step, text in ((int(step), text) for step, text in result["samples"].items()):
        title = "Before training" if step == 0 else f"After {step:,} updates"
        shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
        lines = "\n".join(line.rstrip() for line in shown.strip().split("\n"))
        cards.append(f":::{{grid-item-card}} {title}\n```text\n{lines}\n```\n:::\n")
    return "\n".join(
        [
            f"```{{image}} _static/landing-light.png\n:alt: {alt}\n:class: only-light\n```",
            f"```{{image}} _static/landing-dark.png\n:alt: {alt}\n:class: only-dark\n```",
            "",
            f"One run of the book's LSTM on Shakespeare. After {steps:,} updates it {better} the best "
            "counting model of the same pieces of words, on plays that neither has seen. Along the way it "
            "wrote, from the same prompt each time:",
            "",
            "::::{grid} 1 1 3 3\n:gutter: 2\n:class-container: samples\n",
            *cards,
            "::::",
            "",
        ]
    )


def main() -> None:
    """Run once, or with --redraw take the stored run; write all four files."""
    stored = STATIC / "landing.json"
    if "--redraw" in sys.argv[1:]:
        result = json.loads(stored.read_text(encoding="utf-8"))
    else:
        result = run()
        stored.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (STATIC / "landing.txt").write_text(page(result), encoding="utf-8")
    draw(result, "light", {})
    draw(result, "dark", DARK)
    print(result["ngram"], result["curve"][-1])
    print("\n---\n".join(result["samples"].values()))


if __name__ == "__main__":
    main()
