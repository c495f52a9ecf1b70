"""What `torchrun` runs for test_distributed.py: training in several processes, whose results it writes.

torchrun --standalone --nproc-per-node=2 tests/distributed_runs.py runs FOLDER
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path

import torch

from lmtutorial import lost_process
from lmtutorial.batches import StreamBatches, WindowBatches
from lmtutorial.distributed import Processes, process_group
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.sharding import can_spread_on_cpus, together
from lmtutorial.tensorfile import write_tree
from lmtutorial.train import TrainConfig, train

VOCAB = 11  # odd, as the number of rows is: two processes do not share alike
TOKENS = torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(0)).tolist()
HELD_OUT = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def lstm(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return LSTM(LSTMConfig(VOCAB, width=8, layers=2, dropout=dropout)).double()


def transformer(seed=0, **options):
    torch.manual_seed(seed)
    config = TransformerConfig(VOCAB, context=8, width=16, layers=2, heads=2, tied=True, **options)
    return Transformer(config).double()


def gpt2(seed=0):
    return transformer(seed, position="learned", norm="layer", mlp="gelu")


def with_dropout(seed=0):
    return lstm(seed, dropout=0.3)


ALIKE = {  # name: (model, settings); one process and two should train it alike
    "lstm": (lstm, {}),
    "lstm-accumulated": (lstm, {"accumulation": 2}),
    "lstm-muon": (lstm, {"optimizer": "muon"}),
    "lstm-sharded": (lstm, {"shard": True, "ema": 0.9}),
    "lstm-stops-early": (lstm, {"steps": 200, "learning_rate": 0.1, "eval_every": 2, "patience": 2}),
    "transformer": (transformer, {}),
    "transformer-accumulated": (transformer, {"accumulation": 2, "skip_spikes": 20.0}),
    "transformer-muon": (transformer, {"optimizer": "muon"}),
    "transformer-ema": (transformer, {"ema": 0.9, "clip": None}),
    "transformer-sharded": (transformer, {"shard": True, "ema": 0.9}),
    "transformer-sharded-accumulated": (transformer, {"shard": True, "accumulation": 2, "clip": None}),
    "gpt2-sharded": (gpt2, {"shard": True}),
}
RESUMED = (
    "lstm",
    "lstm-accumulated",
    "lstm-sharded",
    "transformer-muon",
    "transformer-ema",
    "transformer-sharded",
)
RUNS = {**ALIKE, "dropout": (with_dropout, {})}  # each process drops on its own
COMMON = TrainConfig(steps=8, warmup=2, learning_rate=0.01, clip=0.1, log_every=3, eval_every=4)


def run(name, folder, resume=None, batches=None, **changes):
    """Train a run of the table to its end, and write what came of it."""
    make, options = RUNS[name]
    model = make(seed=0 if resume is None else 9)
    batches = batches or batches_for(name)
    held_out = type(batches_for(name))(HELD_OUT, batch=1, time=8)  # fewer rows than processes
    config = dataclasses.replace(COMMON, **{**options, **changes})
    history = train(model, batches, config, validation=held_out, resume=resume)
    weights = {key: together(parameter.detach()) for key, parameter in model.named_parameters()}
    path = folder / f"{name}-{Processes.current().rank}.safetensors"
    write_tree(path, {"history": dataclasses.asdict(history), "weights": weights})


def batches_for(name):
    if RUNS[name][0] in (lstm, with_dropout):
        return StreamBatches(TOKENS, batch=3, time=8)  # 7 batches an epoch, the last with fewer targets
    return WindowBatches(TOKENS, batch=3, time=8, seed=5)


class Leaving:
    """Batches that, in place of the one after so many, do something to the process."""

    def __init__(self, batches, after, leave):
        self.batches, self.left, self.leave = batches, after, leave
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict

    def __iter__(self):
        for batch in self.batches:
            if self.left == 0:
                self.leave()
            self.left -= 1
            yield batch


class LeftError(Exception):
    pass


def begin(name, out):
    """Train it until it breaks off, amid an epoch and a row of the log; its checkpoint is from step 4."""

    def leave():
        raise LeftError

    try:
        updates = 5 * RUNS[name][1].get("accumulation", 1)
        run(name, out, batches=Leaving(batches_for(name), updates, leave), out=out, save_every=4)
    except LeftError:
        return
    raise AssertionError(f"{name} did not break off")


def is_possible(name):
    return can_spread_on_cpus() or "sharded" not in name


def runs(folder):
    """Everything that several processes should do as one does."""
    for name in filter(is_possible, RUNS):
        run(name, folder / "whole")
    for name in filter(is_possible, (*RESUMED, "dropout")):
        begin(name, folder / "begun-by-two" / name)
    for name in filter(is_possible, RESUMED):
        run(name, folder / "resumed-by-two", resume=folder / "begun-by-one" / name)
    run("dropout", folder / "resumed-by-two", resume=folder / "begun-by-two" / "dropout")
    diverge(folder / "diverged")


def diverge(folder):
    """The loss of process 1 alone is no longer a number."""
    model, rank = lstm(), Processes.current().rank
    if rank == 1:
        model.head.register_forward_hook(lambda _m, _i, logits: logits + math.inf)
    config = dataclasses.replace(COMMON, steps=100, log_every=99, save_every=5, out=folder)
    try:
        train(model, batches_for("lstm"), config)
    except FloatingPointError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def lose(folder, sharded, number):
    """Process 1 is killed, or stopped, after 12 updates; the last checkpoint is from step 10."""

    def leave():
        if Processes.current().rank == 1:
            print(os.getpid(), flush=True)
            os.kill(os.getpid(), number)

    lost_process.GRACE = 1.0
    name = "transformer-sharded" if sharded else "transformer"
    batches = Leaving(batches_for(name), 12, leave)
    run(name, folder, batches=batches, schedule="constant", steps=10_000, save_every=5, out=folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out = sys.argv[1], Path(sys.argv[2])
    with process_group():
        if what == "runs":
            runs(out)
        else:
            lose(out, "sharded" in what, signal.SIGSTOP if "stopped" in what else signal.SIGKILL)
