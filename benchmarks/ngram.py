"""How well and how fast does the n-gram model predict, and how fast can one decode from it?

Tiny Shakespeare by characters (nanoGPT's split, the whole validation part scored) and WikiText-2 by words,
read from the folder that LMTUTORIAL_DATA names. A time to train and score goes from token ids to the score of
each token. The peer counts the same n-grams in a dictionary, and does no more than that.
"""

import gzip
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure import alternate, record, table

from lmtutorial.decode.sampling import sample
from lmtutorial.models.ngram import NGram

ORDER = 7


def tiny_shakespeare(folder: Path) -> Iterator[dict[str, object]]:
    text = (folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
    train, validation = np.split(np.array([vocabulary[c] for c in text]), [int(0.9 * len(text))])
    characters = train.tolist()

    def run(held_out: float = 0.0, order: int = ORDER, smoothing: str = "kneser-ney") -> float:
        model = NGram.train(train, order, len(vocabulary), smoothing=smoothing, held_out=held_out)
        return float(model.score(validation).mean())

    def count() -> None:
        for n in range(1, ORDER + 1):
            Counter(zip(*(characters[i:] for i in range(n)), strict=False))

    plain, fitted, dictionary = alternate(run, lambda: run(0.1), count)
    yield row(
        "tiny Shakespeare characters, order 7, train and score",
        plain,
        "s",
        peer="dictionary, counting alone",
        peer_value=dictionary,
    )
    yield row("tiny Shakespeare characters, order 7, train and score, fitted discounts", fitted, "s")
    yield row(
        "tiny Shakespeare characters, order 7, absolute discounting",
        run(smoothing="absolute"),
        "nats/character",
    )
    for order in (ORDER, ORDER + 2):
        yield row(f"tiny Shakespeare characters, order {order}", run(order=order), "nats/character")
        yield row(
            f"tiny Shakespeare characters, order {order}, fitted discounts", run(0.1, order), "nats/character"
        )
    model = NGram.train(train, ORDER, len(vocabulary))
    (seconds,) = alternate(lambda: sample(model, [[0]], 1_000, seed=0))
    yield row("tiny Shakespeare characters, order 7, sample, one row", 1_000 / seconds, "characters/s")
    (seconds,) = alternate(lambda: sample(model, [[0]] * 64, 200, seed=0))
    yield row("tiny Shakespeare characters, order 7, sample, 64 rows", 64 * 200 / seconds, "characters/s")


def wikitext(folder: Path) -> Iterator[dict[str, object]]:
    train_text = gzip.decompress((folder / "wikitext-2" / "train.txt.gz").read_bytes()).decode()
    test_text = (folder / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    train_words, test_words = (text.replace("\n", " <eos> ").split() for text in (train_text, test_text))
    vocabulary = {word: i for i, word in enumerate(sorted(set(train_words)))}
    train, test = (np.array([vocabulary[word] for word in words]) for words in (train_words, test_words))

    def run(held_out: float = 0.0) -> float:
        return float(np.exp(NGram.train(train, 5, len(vocabulary), held_out=held_out).score(test).mean()))

    plain, fitted = alternate(run, lambda: run(0.1), repeats=3)
    yield row("WikiText-2 words, order 5, train and score", plain, "s")
    yield row("WikiText-2 words, order 5, fitted discounts, train and score", fitted, "s")
    yield row("WikiText-2 words, order 5", run(), "test perplexity")
    yield row("WikiText-2 words, order 5, fitted discounts", run(0.1), "test perplexity")
    model = NGram.train(train, 5, len(vocabulary))
    batch = torch.from_numpy(test[: 20 * 35].reshape(20, 35))
    (seconds,) = alternate(lambda: model(batch))
    yield row("WikiText-2 words, full rows of 33,278", batch.numel() / seconds, "rows/s")


def row(name: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None):
    found = {"benchmark": "ngram", "name": name, "value": value, "unit": unit}
    if peer_value is not None:
        found |= {"peer": peer, "peer_value": peer_value, "ratio": value / peer_value}
    return found


def main():
    folder = os.environ.get("LMTUTORIAL_DATA")
    if not folder:
        raise SystemExit("set LMTUTORIAL_DATA to the folder that holds tinyshakespeare/ and wikitext-2/")
    rows = [record(r) for part in (tiny_shakespeare, wikitext) for r in part(Path(folder))]
    print(table({**r, "value": f"{r['value']:.4f}"} for r in rows))


if __name__ == "__main__":
    main()
