"""What do weights in 8 and 4 bits cost in loss, save in bytes, and bring in speed? Beside torchao's int8.

The shipped model of 5M parameters is measured on the first 50,000 characters of the validation plays, then
writes 256 tokens after 32, greedily, in turns. torchao rounds the same linear layers to 8 bits, one scale a
row, symmetrically (`Int8WeightOnlyConfig`). `native` runs our int8 weights in C++.
"""

import argparse
import copy
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, for all: see thread_waits.py

import measure
import peers
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lmtutorial.build import held_out_batches
from lmtutorial.corpora import load_corpus
from lmtutorial.decode.sampling import greedy
from lmtutorial.metrics import evaluate
from lmtutorial.native import native
from lmtutorial.pretrained import load_pretrained
from lmtutorial.quantize import quantize, weight_bytes


def torchao_int8(model):
    """A copy, rounded by torchao; its head apart from the embedding, as ours is."""
    small = copy.deepcopy(model)
    small.head.weight = torch.nn.Parameter(small.head.weight.clone(), requires_grad=False)
    quantize_(small, Int8WeightOnlyConfig())
    return small


def torchao_bytes(model) -> int:
    """What the parameters hold, inside of torchao's tensors too."""

    def inner(tensor):
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.nbytes
        return sum(inner(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    return sum(inner(tensor) for tensor in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=256, help="new tokens")
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer, _ = load_pretrained("shakespeare")
    model.requires_grad_(False)
    peer = peers.version("torchao")
    small = quantize(model)
    models = {
        "float32": model,
        "int8": small,
        "int4": quantize(model, 4),
        "int4, groups of 32": quantize(model, 4, 32),
        f"{peer}, int8": torchao_int8(model),
    }
    tokens = tokenizer.encode_array(load_corpus("shakespeare").text("validation")[:50_000])
    losses = {name: evaluate(m, held_out_batches(m, tokens)).loss for name, m in models.items()}
    sizes = {
        name: torchao_bytes(m) if name.startswith(peer) else weight_bytes(m) for name, m in models.items()
    }
    prompt = tokens[:32].tolist()
    ways = {**models, "float32, native": native(model), "int8, native": native(small)}
    runs = {name: (lambda m=m: greedy(m, [prompt], options.new)) for name, m in ways.items()}
    medians = measure.alternate(*runs.values())
    speeds = {name: options.new / seconds for name, seconds in zip(runs, medians, strict=True)}
    measured = {
        "loss of": (losses, 1, "nats"),
        "weights of": (sizes, 1e6, "MB"),
        "speed of": (speeds, 1, "tokens/s"),
    }
    rows = [
        {
            "benchmark": "quantize", "name": f"{what} {name}", "value": round(values[name] / scale, 5),
            "unit": unit, "peer": "float32", "peer_value": round(values["float32"] / scale, 5),
            "ratio": values[name] / values["float32"], "threads": options.threads,
        }
        for what, (values, scale, unit) in measured.items()
        for name in list(values)[1:]
    ]  # fmt: skip
    measure.report(rows, keep=options.record)


if __name__ == "__main__":
    main()
