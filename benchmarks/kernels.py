"""What `lmtutorial.models.kernels` is worth in training on a CPU: forward and backward, in turns with torch.

`attend` in bfloat16 against `F.scaled_dot_product_attention`, at lengths from 64 to 512 with 2,048 tokens in
all, and `RMSNorm` against `nn.RMSNorm`. A ratio below 1 is a gain.
"""

import argparse
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtutorial.models.kernels import RMSNorm, attend

TOKENS, WIDTH = 2048, 192


def backward(compute: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(10):
            y = compute()
            y.backward(torch.ones_like(y))

    return run


def pairs() -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], str]]:
    """What is compared: ours, torch's, and the name of the latter."""
    found = {}
    for heads in (3, 6):
        for time in (64, 128, 256, 512):
            shape = (TOKENS // time, heads, time, WIDTH // heads)
            q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            found[f"attend, {time} tokens, {heads} heads of {WIDTH // heads}"] = (
                lambda q=q, k=k, v=v: attend(q, k, v),
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                "F.scaled_dot_product_attention",
            )
    for shape in ((TOKENS, WIDTH), (TOKENS * 6, WIDTH // 6)):  # of a block, of the heads' queries
        for dtype in (torch.float32, torch.bfloat16):  # the weights stay in float32, as in training
            x = torch.randn(shape, dtype=dtype, requires_grad=True)
            ours, torchs = RMSNorm(shape[1]), nn.RMSNorm(shape[1], 1e-5)
            found[f"RMSNorm, {shape[0]} rows of {shape[1]}, {str(dtype).removeprefix('torch.')}"] = (
                lambda x=x, f=ours: f(x),
                lambda x=x, f=torchs: f(x),
                "nn.RMSNorm",
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for name, (ours, torchs, peer) in pairs().items():
        mine, theirs = (100 * s for s in measure.alternate(backward(ours), backward(torchs)))
        rows.append(
            {
                "benchmark": "kernels",
                "name": name,
                "value": round(mine, 3),
                "unit": "ms",
                "peer": peer,
                "peer_value": round(theirs, 3),
                "ratio": mine / theirs,
                "threads": options.threads,
            }
        )
    measure.report(rows, keep=options.record)


if __name__ == "__main__":
    main()
