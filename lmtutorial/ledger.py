"""The results ledger: every result that the book states, with what made it, in one file of JSON lines."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from lmtutorial.provenance import commit, processor

LEDGER = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One result: a number for each seed, and all that is needed to judge it and to make it again."""

    id: str
    """What `lmtutorial repro` calls it."""
    values: tuple[float, ...]
    """One for each of `seeds`."""
    seeds: tuple[int, ...]
    unit: str
    config: str
    """The settings, as the recipe had them."""
    seconds: float
    """Of training and measuring, the mean over the seeds."""
    device: str
    cores: int | None
    torch: str
    commit: str | None
    date: str

    @property
    def value(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """The value, with its spread where there is one.

        >>> row = Result("a", (1.5, 1.6, 1.7), (0, 1, 2), "nats", "", 60.0, "cpu", 2, "2.13", None, "2026")
        >>> print(row)
        1.600 ± 0.100
        """
        return f"{self.value:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


def read_results(path: str | os.PathLike[str] = LEDGER) -> dict[str, Result]:
    """The newest row of each result, by its id.

    Raises ValueError for a line that is no result, naming its number.
    """
    results = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["values"], row["seeds"] = tuple(row["values"]), tuple(row["seeds"])
            result = Result(**row)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"line {number} of {path} is no result: {error}") from error
        results[result.id] = result
    return results


def result(name: str) -> Result:
    """The stored result called `name`, as a chapter quotes it.

    Raises ValueError for a name without a row, listing those that there are.
    """
    results = read_results()
    if name not in results:
        raise ValueError(f"the ledger has no result {name!r}; it has {', '.join(sorted(results))}")
    return results[name]


def record(
    name: str,
    values: Iterable[float],
    seeds: Iterable[int],
    *,
    unit: str,
    config: str,
    seconds: float,
    path: str | os.PathLike[str] = LEDGER,
) -> Result:
    """Append a result to the ledger, with the machine, the version and the commit that made it.

    Raises ValueError for values that are not finite, or as many as the seeds.
    """
    values, seeds = tuple(values), tuple(seeds)
    if len(values) != len(seeds) or not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{len(seeds)} seeds need as many finite values, got {values}")
    row = Result(
        name,
        values,
        seeds,
        unit,
        config,
        round(seconds, 1),
        torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        os.cpu_count(),
        torch.__version__,
        commit(),
        datetime.now(UTC).date().isoformat(),
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    return row
