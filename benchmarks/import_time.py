"""How long `import lmtutorial` and its main modules take beyond `import torch`: fresh processes, in turns.

The bar: `import lmtutorial` costs at most 0.2 s beyond `import torch`.
"""

import argparse
import statistics
import subprocess
import sys

import measure

MODULES = "models.lstm train decode.sampling tokenizers corpora plots cli"

PROGRAM = """
import time
import torch
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def seconds(module: str) -> float:
    """Of importing `module` in a fresh process that has imported torch."""
    program = PROGRAM.format(module=module)
    return float(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    modules = ["lmtutorial", *(f"lmtutorial.{name}" for name in MODULES.split())]
    times: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(options.repeats):
        for module in modules:
            times[module].append(seconds(module))
    medians = {module: statistics.median(values) for module, values in times.items()}
    rows = [
        {"benchmark": "import_time", "name": f"import {module}", "value": value, "unit": "s beyond torch"}
        for module, value in medians.items()
    ]
    if options.record:
        measure.record(rows[0])
    print(measure.table(rows))


if __name__ == "__main__":
    main()
