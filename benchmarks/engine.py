"""What does continuous batching gain? 64 requests of mixed length through the engine, and in other ways.

A 10.6M-parameter GPT (6 layers, 384 wide, 6 heads, 65 tokens, context 512) with random weights writes
greedily: texts of 16 to 256 tokens after prompts of 8 to 64, drawn by a fixed seed. Beside the engine: the
same requests one after the other (our `greedy`), both with the model's own steps and with steps in C++
(`native`), and `generate` of `transformers` in static batches on the same weights, padded on the left to the
longest prompt and run to the longest text: as many requests at a time as the engine has rows, and all 64. All
must write the same, and count the tokens that were asked for. Then what a step costs beyond its forward, in
microseconds, by rows and by how many kinds of filters are in use.
"""

import argparse
import os
import random
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, for all: see thread_waits.py

import measure
import peers
import torch

from lmtutorial.decode.logits import Filters
from lmtutorial.decode.sampling import greedy
from lmtutorial.engine import Engine
from lmtutorial.models.cache import LanguageModel
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.native import native
from lmtutorial.request import Request

GPT = TransformerConfig.gpt2(vocab_size=65, context=512, width=384, layers=6, heads=6)
GREEDY = Filters(temperature=0)


def requests(count: int) -> list[Request]:
    """Prompts of 8 to 64 tokens, texts of 16 to 256."""
    rng = random.Random(0)
    sizes = [(rng.randint(8, 64), rng.randint(16, 256)) for _ in range(count)]
    return [Request([rng.randrange(65) for _ in range(length)], steps, GREEDY) for length, steps in sizes]


def continuous(model: LanguageModel, wanted: list[Request], rows: int) -> list[list[int]]:
    return [text.tokens for text in Engine(model, rows).generate(wanted)]


def one_by_one(model: LanguageModel, wanted: list[Request]) -> list[list[int]]:
    return [greedy(model, [r.prompt], r.max_new_tokens)[0].tokens for r in wanted]


@torch.inference_mode()
def static(peer: Any, wanted: list[Request], rows: int) -> list[list[int]]:
    """Batches of `rows` requests, in the order in which they come."""
    texts = []
    for start in range(0, len(wanted), rows):
        batch = wanted[start : start + rows]
        longest = max(len(r.prompt) for r in batch)
        gaps = [longest - len(r.prompt) for r in batch]
        ids = torch.tensor([[0] * gap + list(r.prompt) for gap, r in zip(gaps, batch, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * len(r.prompt) for gap, r in zip(gaps, batch, strict=True)])
        steps = max(r.max_new_tokens for r in batch)
        new = peer.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
        )[:, longest:]
        texts += [row[: r.max_new_tokens] for row, r in zip(new.tolist(), batch, strict=True)]
    return texts


def overhead(model: Transformer, rows: int, kinds: int, steps: int = 60) -> float:
    """Microseconds of a step beyond its forward, with all rows taken: the median of what is left."""
    engine, inside = Engine(model, rows), 0.0

    class Timed:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, *arguments: Any) -> torch.Tensor:
            nonlocal inside
            start = time.perf_counter()
            logits = model(*arguments)
            inside = time.perf_counter() - start
            return logits

    engine.model = Timed()  # type: ignore[assignment]
    for row in range(rows):
        filters = Filters(0.8, top_k=20 + row % kinds, top_p=0.95)
        engine.submit(Request([row % 65] * 32, steps + 10, filters, seed=row))
    engine.step()
    spent = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        spent.append(time.perf_counter() - start - inside)
    return sorted(spent)[steps // 2] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Transformer(GPT).eval()
    peer, wanted, fast = peers.as_transformers(model), requests(options.requests), native(model)
    tokens = sum(r.max_new_tokens for r in wanted)
    hf = peers.version("transformers")
    runs: dict[str, Callable[[], list[list[int]]]] = {
        f"engine of {options.rows} rows": lambda: continuous(model, wanted, options.rows),
        "one after the other": lambda: one_by_one(model, wanted),
        f"engine of {options.rows} rows, native": lambda: continuous(fast, wanted, options.rows),
        "one after the other, native": lambda: one_by_one(fast, wanted),
        f"{hf}, static batches of {options.rows}": lambda: static(peer, wanted, options.rows),
        f"{hf}, static batch of all": lambda: static(peer, wanted, len(wanted)),
    }
    texts = [run() for run in runs.values()]
    assert all(same == texts[0] for same in texts[1:]), "the ways do not write the same texts"
    seconds = dict(
        zip(runs, measure.alternate(*runs.values(), repeats=options.repeats, warmup=0), strict=True)
    )
    rows: list[dict[str, object]] = [
        {
            "benchmark": "engine", "name": f"{len(wanted)} requests, {ours}",
            "value": round(tokens / seconds[ours]), "unit": "tokens/s", "peer": name,
            "peer_value": round(tokens / seconds[name]), "ratio": seconds[name] / seconds[ours],
            "threads": options.threads,
        }
        for ours in runs
        for name in runs
        if ours.startswith("engine") and not name.startswith("engine")
        if "native" in ours or "native" not in name
    ]  # fmt: skip
    for count in (1, 16, 32):
        for kinds in (1, 16):
            if kinds <= count:
                name = f"a step beyond its forward, {count} rows, {kinds} kinds of filters"
                spent = overhead(model, count, kinds)
                rows.append(
                    {"benchmark": "engine", "name": name, "value": round(spent), "unit": "us",
                     "threads": options.threads}
                )  # fmt: skip
    measure.report(rows, keep=options.record)


if __name__ == "__main__":
    main()
