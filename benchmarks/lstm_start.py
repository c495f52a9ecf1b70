"""How the scale of fresh embeddings changes what an LSTM has learned after a given number of updates.

The loss on unseen plays in nats per token, same seed and batches: the package's start (EMBEDDING_STD)
against width**-0.5. No timing: the value is the loss, and the ratio is ours to the other's.
"""

import argparse

import measure
import torch

from lmtutorial.batches import StreamBatches
from lmtutorial.corpora import load_corpus
from lmtutorial.models.lstm import EMBEDDING_STD, LSTM, LSTMConfig
from lmtutorial.tokenizers import BPETokenizer
from lmtutorial.train import TrainConfig, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    corpus = load_corpus("shakespeare")
    tokenizer = BPETokenizer.train(corpus.text("train"), vocab_size=options.vocab_size)
    tokens, unseen = (tokenizer.encode_array(corpus.text(split)) for split in ("train", "validation"))
    settings = TrainConfig(
        steps=options.steps, learning_rate=1e-2, precision="float32", eval_every=options.steps
    )

    def loss(std: float, seed: int) -> float:
        torch.manual_seed(seed)
        model = LSTM(LSTMConfig(tokenizer.vocab_size, options.width))
        torch.nn.init.normal_(model.embedding.weight, std=std)
        validation = StreamBatches(unseen[:25_000], batch=16, time=64)
        return train(model, StreamBatches(tokens, 32, 32), settings, validation=validation).best_loss

    rows = []
    for seed in range(options.seeds):
        ours, theirs = loss(EMBEDDING_STD, seed), loss(options.width**-0.5, seed)
        rows.append(
            {
                "benchmark": "lstm_start",
                "name": f"loss after {options.steps} updates, seed {seed}",
                "value": ours,
                "unit": "nats/token",
                "peer": "embeddings from width**-0.5",
                "peer_value": theirs,
                "ratio": ours / theirs,
                "width": options.width,
                "vocab_size": options.vocab_size,
            }
        )
    measure.report(rows, keep=options.record)


if __name__ == "__main__":
    main()
