"""What all benchmarks share: timing two things in turns, and writing down what came out.

Other load on the machine changes from second to second, so what is compared is timed in turns, A B A B, in
one process, and the medians are compared.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lmtutorial.provenance import commit, processor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"


def alternate(*runs: Callable[[], object], repeats: int = 5, warmup: int = 1) -> list[float]:
    """Median seconds of each of `runs`, called in turns `repeats` times after `warmup` turns to warm up.

    A run on a GPU must synchronize before it returns.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(warmup + repeats):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn >= warmup:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def record(row: dict[str, object], path: str | os.PathLike[str] = RESULTS) -> dict[str, object]:
    """Append `row` to the ledger with where, when and how it was measured, and return the whole row.

    `row` holds benchmark, name, value and unit, and where there is something to compare with, peer (its name)
    and ratio (ours to the peer's, its value under "peer_value" if that is worth keeping).
    """
    missing = {"benchmark", "name", "value", "unit"} - row.keys()
    if missing:
        raise ValueError(f"the row lacks {', '.join(sorted(missing))}: {row!r}")
    whole = {
        "peer": None,
        "ratio": None,
        **row,
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # of others too
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(whole) + "\n")
    return whole


def report(rows: Iterable[dict[str, object]], keep: bool) -> None:
    """Print the rows as a table, and if they are to be kept, append them to the ledger."""
    rows = list(rows)
    if keep:
        for row in rows:
            record(row)
    print(table(rows))


def table(rows: Iterable[dict[str, object]]) -> str:
    """The rows as aligned text."""
    head = ("what", "value", "unit", "ratio", "peer")
    lines = [head, *((r["name"], r["value"], r["unit"], r.get("ratio"), r.get("peer")) for r in rows)]
    cells = [[_cell(value) for value in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i in (1, 3) else cell.ljust(width)
                  for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    )  # fmt: skip


def machine() -> dict[str, object]:
    """The processor's model and number of cores, and the GPU's name where PyTorch is in use and sees one."""
    found: dict[str, object] = {"cpu": processor(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def command() -> str:
    """How this benchmark was called, as seen from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
