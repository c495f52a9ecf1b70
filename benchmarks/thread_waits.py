"""Training speed of the command line by how long waiting threads spin (GOMP_SPINCOUNT).

Fresh processes in turns, each training the default model for some seconds; the value is updates a second, the
peer the OpenMP library's own default. `--busy` runs that many other programs that never rest. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

SPINS = {"1,000 turns (ours)": "1000", "sleep at once": "0", "300,000 turns (default)": "300000"}


def updates_per_second(spin: str, seconds: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lmtutorial.cli", "train", "--out", folder]
        command += ["--max-seconds", str(seconds), "--precision", "float32"]
        environment = os.environ | {"GOMP_SPINCOUNT": spin}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        last = json.loads((Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return float(last["step"] / last["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        turns = [
            [updates_per_second(spin, options.seconds) for spin in SPINS.values()]
            for _ in range(options.repeats)
        ]
    finally:
        for other in others:
            other.kill()
    speeds = [statistics.median(speed) for speed in zip(*turns, strict=True)]
    rows = [
        {
            "benchmark": "thread_waits",
            "name": f"{name}, {options.busy} other programs",
            "value": speed,
            "unit": "updates/s",
            "peer": "300,000 turns",
            "ratio": speed / speeds[-1],
        }
        for name, speed in zip(SPINS, speeds, strict=True)
    ]
    measure.report(rows, keep=options.record)


if __name__ == "__main__":
    main()
