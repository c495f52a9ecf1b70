"""Training speed of the article's LSTM: its own plain loop against the package's, in turns.

Vocabulary 10,000, width 512, one layer, batches of 20 times 35 tokens. The plain loop is the article's
program, mended only so far that it runs (`batch_first`, and a data loader): Embedding, nn.LSTM, Linear,
CrossEntropyLoss, Adam, all in float32. Ours is `lmtutorial.train.train` with its defaults; the rows before it
take single changes back. The bar: at least 1.6 times the tokens a second.
"""

import argparse
from collections.abc import Callable

import measure
import torch
from torch import Tensor, nn

from lmtutorial.batches import StreamBatches
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.train import TrainConfig, train

VOCAB, WIDTH, BATCH, TIME = 10_000, 512, 20, 35


class ArticleLSTM(nn.Module):
    """The article's model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(tokens))
        return self.linear(out)


def article(tokens: Tensor) -> Callable[[], object]:
    """The article's loop."""
    model = ArticleLSTM()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters())
    batches = StreamBatches(tokens, BATCH, TIME)

    def run() -> None:
        for batch in batches:  # an epoch has as many batches as a turn has updates
            loss = criterion(model(batch.inputs).view(-1, VOCAB), batch.targets.view(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def ours(tokens: Tensor, steps: int, *, tied: bool = True, **options: object) -> Callable[[], object]:
    """The package's loop."""
    model = LSTM(LSTMConfig(VOCAB, WIDTH, tied=tied))
    batches = StreamBatches(tokens, BATCH, TIME)
    config = TrainConfig(steps=steps, schedule="constant", warmup=0, log_every=steps, **options)
    return lambda: train(model, batches, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="updates in a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (BATCH * TIME * options.steps + 1,), generator=generator)
    runs = {
        "the article's loop": article(tokens),
        "ours, float32, untied": ours(tokens, options.steps, tied=False, precision="float32"),
        "ours, float32": ours(tokens, options.steps, precision="float32"),
        "ours, bfloat16, untied": ours(tokens, options.steps, tied=False, precision="bfloat16"),
        "ours": ours(tokens, options.steps),
    }
    seconds = measure.alternate(*runs.values(), repeats=options.repeats)
    speeds = [BATCH * TIME * options.steps / s for s in seconds]
    rows = [
        {
            "benchmark": "train_lstm",
            "name": name,
            "value": round(speed),
            "unit": "tokens/s",
            "peer": "the article's loop",
            "peer_value": round(speeds[0]),
            "ratio": speed / speeds[0],
            "threads": options.threads,
        }
        for name, speed in zip(runs, speeds, strict=True)
    ]
    if options.record:
        for row in rows[1:]:
            measure.record(row)
    print(measure.table(rows))


if __name__ == "__main__":
    main()
