"""What does a decode step cost beyond the model's own forward?

An LSTM (1 layer, tied) writes 200 tokens after each of a batch of prompts of one token: once by its bare
forward alone, then by this package's decoders, then by the loop one would write with `torch.multinomial` and
Hugging Face's logits processors on the same forward. All in one process, in turns, medians of five; prints
microseconds a step, and appends a JSON row to the file named by --json.
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial

import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from lmtutorial.decode.sampling import greedy, sample
from lmtutorial.models.lstm import LSTM, LSTMConfig

STEPS = 200


@torch.inference_mode()
def bare(model, batch):
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    cache = model.new_cache(batch, STEPS + 1)
    for _ in range(STEPS):
        model(tokens, cache)


@torch.inference_mode()
def plain(model, batch, processors=()):
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    cache = model.new_cache(batch, STEPS + 1)
    written = []
    for _ in range(STEPS):
        logits = model(tokens, cache)[:, -1]
        for processor in processors:
            logits = processor(tokens, logits)
        tokens = torch.multinomial(logits.softmax(-1), 1)
        written.append(tokens)
    return torch.cat(written, 1).tolist()


def microseconds(runs, device):
    times = {name: [] for name in runs}
    for _ in range(6):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / STEPS * 1e6)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first run warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="a file to append the row to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row = {
        "benchmark": "sampling",
        "torch": torch.__version__,
        "machine": platform.processor(),
        **vars(arguments),
    }
    print(
        "vocab width batch | " + " ".join(f"{name:>14}" for name in contestants(None, 1)) + "   (µs a step)"
    )
    for vocab, width, batch in [(65, 128, 1), (65, 128, 20), (10_000, 512, 1), (10_000, 512, 20)]:
        torch.manual_seed(0)
        model = LSTM(LSTMConfig(vocab, width)).to(arguments.device).eval()
        times = microseconds(contestants(model, batch), arguments.device)
        print(f"{vocab:5} {width:5} {batch:5} | " + " ".join(f"{t:14.1f}" for t in times.values()))
        row[f"{vocab}-{width}-{batch}"] = {name: round(t, 1) for name, t in times.items()}
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def contestants(model, batch):
    prompts = [[0]] * batch
    filters = {"top_k": 50, "top_p": 0.95}
    return {
        "bare forward": partial(bare, model, batch),
        "greedy": partial(greedy, model, prompts, STEPS),
        "sample": partial(sample, model, prompts, STEPS, seed=0),
        "sample, k & p": partial(sample, model, prompts, STEPS, seed=0, **filters),
        "multinomial": partial(plain, model, batch),
        "HF, k & p": partial(plain, model, batch, [TopKLogitsWarper(50), TopPLogitsWarper(0.95)]),
    }


if __name__ == "__main__":
    main()
