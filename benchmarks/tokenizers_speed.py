"""How fast do the tokenizers train and encode, beside Hugging Face's library?

Needs tiny Shakespeare and WikiText-2 under the folder that LMTUTORIAL_DATA names. Each comparison times both
sides in turns, in one process; values are medians of five. The library runs on all cores, in the way that is
fastest for it (many pieces of text, no offsets); the tokenizer from scratch runs on one.
"""

import gzip
import itertools
import os
import sys
from pathlib import Path

import numpy as np
from measure import alternate, record, table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lmtutorial.bpe import BPE
from lmtutorial.tokenizers import BPETokenizer, CharTokenizer, WordTokenizer
from lmtutorial.words import chunks

MERGES = 8_000
LIBRARY = "tokenizers (Hugging Face)"


def read_texts():
    folder = os.environ.get("LMTUTORIAL_DATA")
    if not folder:
        sys.exit("set LMTUTORIAL_DATA to a folder with tinyshakespeare/ and wikitext-2/")
    shakespeare = Path(folder, "tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    with gzip.open(Path(folder, "wikitext-2", "train.txt.gz"), "rt", encoding="utf-8") as file:
        return shakespeare, file.read(5_000_000)


def library_train(parts):
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGES,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(parts, trainer)
    return library


def library_encode(library, parts):
    encodings = library.encode_batch_fast(parts, add_special_tokens=False)
    return list(itertools.chain.from_iterable(encoding.ids for encoding in encodings))


def training(text):
    parts = list(chunks(text))
    ours, library, whole = alternate(
        lambda: BPE.train(text, 256 + MERGES), lambda: library_train(parts), lambda: library_train([text])
    )
    row = {"benchmark": "tokenizers_speed", "name": "BPE.train, 8k merges", "value": ours, "unit": "s"}
    yield row | {"peer": f"{LIBRARY}, {len(parts)} pieces", "peer_value": library, "ratio": ours / library}
    yield row | {"peer": f"{LIBRARY}, one piece", "peer_value": whole, "ratio": ours / whole}


def encoding(name, text, trained):
    """Encode with a warm cache, with a cache emptied before, and with the library, to lists of ids."""
    merges = trained.merges
    library = BPETokenizer.from_merges(merges).to_library()
    parts, megabytes = list(chunks(text)), len(text.encode()) / 1e6
    assert trained.encode(text) == library_encode(library, parts)
    fresh = (BPE(merges) for _ in itertools.count())
    ready = [next(fresh) for _ in range(6)]
    warm, cold, peer = alternate(
        lambda: trained.encode(text),
        lambda: ready.pop().encode(text),
        lambda: library_encode(library, parts),
    )
    for state, seconds in (("warm", warm), ("cold", cold)):
        yield {
            "benchmark": "tokenizers_speed",
            "name": f"BPE.encode, {name}, {state} cache",
            "value": megabytes / seconds,
            "unit": "MB/s",
            "peer": LIBRARY,
            "peer_value": megabytes / peer,
            "ratio": peer / seconds,
        }


def arrays(name, tokenizer, text, peer, encode):
    megabytes = len(text.encode()) / 1e6
    ours, theirs = alternate(lambda: tokenizer.encode_array(text), encode)
    yield {
        "benchmark": "tokenizers_speed",
        "name": f"{type(tokenizer).__name__}.encode_array, {name}",
        "value": megabytes / ours,
        "unit": "MB/s",
        "peer": peer,
        "peer_value": megabytes / theirs,
        "ratio": theirs / ours,
    }


def main():
    shakespeare, wikitext = read_texts()
    trained = BPE.train(shakespeare, 256 + MERGES)
    bpe = BPETokenizer.from_merges(trained.merges)
    library, parts = bpe.to_library(), list(chunks(wikitext))
    five = (shakespeare * 5)[:5_000_000]
    char = CharTokenizer.train(five)
    numbers = {character: i for i, character in enumerate(char.characters)}
    words = WordTokenizer.train(wikitext, None, style="wikitext")
    rows = [
        *training(shakespeare),
        *encoding("tiny Shakespeare", shakespeare, trained),
        *encoding("5 MB of WikiText-2", wikitext, trained),
        *arrays("5 MB of WikiText-2", bpe, wikitext, f"{LIBRARY}, {len(parts)} pieces",
                lambda: np.array(library_encode(library, parts), dtype=np.uint16)),
        *arrays("5 MB of Shakespeare", char, five, "a list comprehension over a dict",
                lambda: np.array([numbers[character] for character in five], dtype=np.uint16)),
        *arrays("5 MB of WikiText-2", words, wikitext, "split and a dict",
                lambda: [words._ids[w] for line in wikitext.split("\n") for w in (*line.split(), "\n")]),
    ]  # fmt: skip
    print(table([record(row) for row in rows]))


if __name__ == "__main__":
    main()
