"""How fast are decoders, against `transformers` and CTranslate2 on the same weights?

256 new tokens after 32, greedily unless said otherwise, with random weights. The small model is a GPT-2 of
10.6M parameters (6 layers, 384 wide, 6 heads, 65 tokens), the large one has the shape of GPT-2 itself (124M).
Each way to decode has a process of its own, which waits while another's turn is timed: in one process, the
threads of one library would have the other's wait less eagerly for each other, at twice the time.

Where the computation is the same, in float32, all must write the same tokens (of CTranslate2's beams some
differ: it stops by another rule); of int8, which rounds, the share that is the same is printed. What int8
costs in loss is a law on a trained model, tests/test_quantize.py. `read_limit` is the speed, in GB/s, at
which memory was read in the same run, and `share_of_read_limit` how much of it our steps make use of.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, for all: see thread_waits.py

import measure
import peers
import torch

from lmtutorial.decode.beam import beam_search
from lmtutorial.decode.sampling import greedy
from lmtutorial.models.cache import LanguageModel
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.native import native
from lmtutorial.quantize import quantize
from lmtutorial.roofline import decode_work, measure_limits

SMALL = TransformerConfig.gpt2(vocab_size=65, context=512, width=384, layers=6, heads=6)
SHAPES = {"10.6M": SMALL, "124M": TransformerConfig.gpt2()}
AFTER, NEW = 32, 256
NATIVE, PLAIN, UNCACHED = "native", "our plain loop", "our plain loop without a cache"
HF, CT2 = peers.version("transformers"), peers.version("ctranslate2")
Texts = list[list[int]]

QUESTIONS = {
    "10.6M, batch 1, float32": ("10.6M", 1, 1, f"{NATIVE}, float32", [PLAIN, HF, f"{CT2}, float32"]),
    "10.6M, batch 1, int8": ("10.6M", 1, 1, f"{NATIVE}, int8", [PLAIN, HF, f"{CT2}, int8"]),
    "124M, batch 1, float32": ("124M", 1, 1, f"{NATIVE}, float32", [PLAIN, HF, f"{CT2}, float32"]),
    "124M, batch 1, int8": ("124M", 1, 1, f"{NATIVE}, int8", [PLAIN, HF, f"{CT2}, int8"]),
    "10.6M, batch 16, float32": (
        "10.6M", 16, 1, f"{NATIVE}, float32", [PLAIN, HF, f"{CT2}, float32", f"{CT2}, int8"],
    ),
    "10.6M, batch 16, int8": ("10.6M", 16, 1, f"{NATIVE}, int8", [PLAIN, HF, f"{CT2}, int8"]),
    "10.6M, beam 4, float32": ("10.6M", 1, 4, f"{NATIVE}, float32", [PLAIN, HF, f"{CT2}, float32"]),
    "10.6M, cache": ("10.6M", 1, 1, PLAIN, [UNCACHED]),
    "10.6M, cache, native": ("10.6M", 1, 1, f"{NATIVE}, float32", [UNCACHED]),
}  # fmt: skip


def model_of(shape: str) -> Transformer:
    """Random weights, spread so that the choice of a token is seldom a near tie."""
    torch.manual_seed(0)
    model = Transformer(SHAPES[shape]).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("weight") and tensor.dim() == 2:
            tensor.mul_(2.0)
    return model


def ours(model: LanguageModel, prompts: Texts, new: int, beams: int) -> Texts:
    if beams == 1:
        return [text.tokens for text in greedy(model, prompts, new)]
    return [texts[0].tokens for texts in beam_search(model, prompts, new, width=beams)]


def uncached(model: Transformer, prompts: Texts, new: int) -> Texts:
    """All of the text is read again for each token."""
    tokens = torch.tensor(prompts)
    with torch.inference_mode():
        for _ in range(new):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return [row[len(prompts[0]) :] for row in tokens.tolist()]


def texts_of(way: str, shape: str, threads: int) -> Callable[[Texts, int, int], Texts]:
    """The function of one way to decode: from prompts, new tokens and beams."""
    model = model_of(shape)
    name, _, kind = way.partition(", ")
    if name == NATIVE:
        return functools.partial(ours, native(quantize(model) if kind == "int8" else model))
    if name == PLAIN:
        return functools.partial(ours, model)
    if name == UNCACHED:
        return lambda prompts, new, beams: uncached(model, prompts, new)
    peer = peers.as_transformers(model)
    if name == HF:
        return functools.partial(peers.transformers_texts, peer)
    return peers.CTranslate2(peer, kind, threads).texts


def work(way: str, shape: str, batch: int, beams: int, new: int, threads: int) -> None:
    """A process of its own: for each line of input decode once; print seconds, and what was written."""
    torch.set_num_threads(threads)
    decode = texts_of(way, shape, threads)
    prompts = torch.randint(65, (batch, AFTER), generator=torch.Generator().manual_seed(0)).tolist()
    for _ in sys.stdin:
        start = time.perf_counter()
        texts = decode(prompts, new, beams)
        print(json.dumps({"seconds": time.perf_counter() - start, "texts": texts}), flush=True)


class Way:
    """One way to decode, in its process."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, __file__, "--work", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self) -> tuple[float, Texts]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["seconds"], answer["texts"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(what: str, new: int, threads: int, repeats: int) -> Iterator[dict[str, object]]:
    """The rows of one question: our way against each of the others, in turns."""
    shape, batch, beams, mine, others = QUESTIONS[what]
    ways = {way: Way(way, shape, batch, beams, new, threads) for way in [mine, *others]}
    texts = {name: way.run()[1] for name, way in ways.items()}  # and all are warm
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    limits = []
    for _ in range(repeats):
        limits.append(measure_limits().bytes_a_second)
        for name, way in ways.items():
            seconds[name].append(way.run()[0])
    for way in ways.values():
        way.close()
    speeds = {name: batch * new / statistics.median(times) for name, times in seconds.items()}
    limit, model = statistics.median(limits), model_of(shape)
    model = quantize(model) if "int8" in mine else model
    read = decode_work(model, AFTER + new // 2, batch * beams).bytes * speeds[mine] / batch
    for name in others:
        same = sum(a == b for one, two in zip(texts[mine], texts[name], strict=True)
                   for a, b in zip(one, two, strict=True)) / (batch * new)  # fmt: skip
        yield {
            "benchmark": "decode", "name": f"{what}: {mine}", "value": round(speeds[mine]),
            "unit": "tokens/s", "peer": name, "peer_value": round(speeds[name]),
            "ratio": speeds[mine] / speeds[name], "threads": threads, "same_tokens": round(same, 3),
            "share_of_read_limit": round(read / limit, 2), "read_limit": round(limit / 1e9, 1),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=NEW, help="new tokens")
    parser.add_argument("--only", default="", help=f"questions that hold this; of {', '.join(QUESTIONS)}")
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for what in QUESTIONS:
        if options.only in what:
            rows = list(compare(what, options.new, options.threads, options.repeats))
            measure.report(rows, keep=options.record)
            same = ", ".join(f"{row['same_tokens']:.0%} of {row['peer']}" for row in rows)
            print(
                f"  same tokens: {same}; {rows[0]['share_of_read_limit']} of {rows[0]['read_limit']} GB/s\n"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        way, shape, *numbers = sys.argv[2:]
        work(way, shape, *map(int, numbers))
    else:
        main()
