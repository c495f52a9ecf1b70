"""Training steps of a GPT: the package's model and update against transformers' GPT2LMHeadModel, in turns.

The peer is `GPT2LMHeadModel` in a plain loop: its own logits, `F.cross_entropy`, clipping, fused AdamW, the
same batches; dropout is off on both sides, and both have GPT-2's architecture and the same number of
parameters. Ours is `lmtutorial.update.Updater`, what `train` calls for each update. "small" is nanoGPT's
CPU model (4 layers, 128 wide, block 64, batch 12), "medium" its Shakespeare model (6 layers, 384 wide,
block 256) with a batch of 8.

The bars: small at most 0.85 of the peer's time in float32; medium at most 0.60 of the peer's in float32,
and no more than the peer's in bfloat16, with no more memory than the peer. Memory is the highest resident
size of a fresh process that makes three updates, less what it was before the model was built.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import torch
import torch.nn.functional as F

from lmtutorial.batches import Batch
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.runs import Progress
from lmtutorial.train import TrainConfig
from lmtutorial.update import Updater

VOCAB = 65
SIZES = {"small": (4, 4, 128, 64, 12), "medium": (6, 6, 384, 256, 8)}  # layers, heads, width, block, batch
PLAIN = TrainConfig(learning_rate=1e-3, weight_decay=0.1)


def tokens(size: str) -> torch.Tensor:
    *_, time, batch = SIZES[size]
    return torch.randint(VOCAB, (batch, time + 1), generator=torch.Generator().manual_seed(0))


def peer(size: str, precision: str) -> Callable[[], object]:
    """transformers' model in a plain loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width, time, _ = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=time, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    rows = tokens(size)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def ours(
    size: str, precision: str, *, preset: str = "gpt2", optimizer: str = "adamw"
) -> Callable[[], object]:
    """The package's model and update."""
    layers, heads, width, time, _ = SIZES[size]
    torch.manual_seed(0)
    shape = (VOCAB, time, width, layers, heads)
    model = Transformer(
        TransformerConfig.gpt2(*shape) if preset == "gpt2" else TransformerConfig(*shape, qk_norm=True)
    ).train()
    options = {**vars(PLAIN), "precision": precision, "optimizer": optimizer}
    update, run = Updater(model, TrainConfig(**options)), Progress.begin(torch.device("cpu"))
    rows = tokens(size)
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    return lambda: update([batch], 1e-3, run)


CASES = {
    "transformers, float32": lambda size: peer(size, "float32"),
    "transformers, bfloat16": lambda size: peer(size, "bfloat16"),
    "ours, float32": lambda size: ours(size, "float32"),
    "ours, bfloat16": lambda size: ours(size, "bfloat16"),
    "ours, bfloat16, modern": lambda size: ours(size, "bfloat16", preset="modern"),
    "ours, bfloat16, modern, Muon": lambda size: ours(size, "bfloat16", preset="modern", optimizer="muon"),
}
MEMORY = [case for case in CASES if "modern" not in case]


def resident(which: str) -> float:
    """MiB of this process: VmRSS is what is resident now, VmHWM the most since it was last reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(which))) / 1024


def memory(case: str, size: str) -> float:
    """MiB that a fresh process needs for three updates, beyond what its imports need."""
    command = [sys.executable, __file__, "--memory-of", case, "--sizes", size]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def memory_here(case: str, size: str) -> float:
    import transformers  # noqa: F401  # both sides start from the same imports

    small = torch.randn(64, 64, requires_grad=True)
    (small.bfloat16() @ small.bfloat16()).float().sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: the imports needed more for a moment
    before = resident("VmRSS")
    step = CASES[case](size)
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def row(
    size: str, case: str, other: str, values: dict[str, float], unit: str, threads: int
) -> dict[str, object]:
    return {
        "benchmark": "train_transformer",
        "name": f"{size}: {case}",
        "value": round(values[case], 2),
        "unit": unit,
        "peer": other,
        "peer_value": round(values[other], 2),
        "ratio": values[case] / values[other],
        "threads": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    parser.add_argument("--memory-of", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(memory_here(options.memory_of, options.sizes[0]))
        return
    rows = []
    for size in options.sizes:
        steps = {case: make(size) for case, make in CASES.items()}
        inner = 10 if size == "small" else 2

        def turn(step: Callable[[], object], inner: int = inner) -> Callable[[], object]:
            return lambda: [step() for _ in range(inner)]

        seconds = measure.alternate(*(turn(step) for step in steps.values()), repeats=options.repeats)
        times = dict(zip(steps, (1e3 * s / inner for s in seconds), strict=True))
        peaks = {case: memory(case, size) for case in MEMORY} if size == "medium" else {}
        for unit, values in (("ms/update", times), ("MiB", peaks)):
            rows += [row(size, case, other, values, unit, options.threads)
                     for case in values if case.startswith("ours")
                     for other in values if other.startswith("transformers")]  # fmt: skip
    measure.report(rows, keep=options.record)


if __name__ == "__main__":
    main()
