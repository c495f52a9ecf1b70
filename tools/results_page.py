"""Write the tables of the results page from the ledger and the benchmarks' rows.

`python tools/results_page.py` rewrites the part of book/results.md between its two marks; with `--check` it
fails where that part is not what the rows say.
"""

import json
import sys
from pathlib import Path

from lmtutorial.ledger import Result, read_results
from lmtutorial.repro import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "results.md"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"


def page(text: str) -> str:
    """The page with its rows made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{results()}\n\n## Speed and memory\n\n{SPEED}\n\n{speeds()}\n\n{END}{tail}"


def results() -> str:
    """One section for each result of the ledger."""
    rows = read_results()
    return "\n\n".join(_result(name, rows[name]) for name in RECIPES if name in rows)


def _result(name: str, row: Result) -> str:
    recipe = RECIPES[name]
    seeds = f"{len(row.seeds)} seeds" if len(row.seeds) > 1 else "one seed"
    published = f"\n- published: {recipe.published} ({recipe.source})" if recipe.published else ""
    return (
        f"### `{name}`\n\n{recipe.what}: **{row} {recipe.unit}** ({seeds}){published}\n"
        f"- made on {row.device}, {row.cores} cores, torch {row.torch}, {row.date}, commit `{row.commit}`; "
        f"{row.seconds:.0f} seconds a seed\n- settings: `{row.config}`"
    )


SPEED = (
    "The newest row of each measurement in `benchmarks/results.jsonl`: ours beside another implementation of "
    "the same work, in turns, in one process, medians of five. A ratio is ours to the other's, in the unit "
    "of the row: above 1 is better for speeds, below 1 for times and memory."
)


def speeds() -> str:
    """The newest row of each benchmark that compares with a peer, as a table."""
    newest = {}
    for line in (ROOT / "benchmarks" / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("ratio") is not None:
            newest[row["benchmark"], row["name"], row["unit"], row["peer"]] = row
    lines = ["| benchmark | what | value | beside | ratio | machine |", "|---|---|---:|---|---:|---|"]
    for (benchmark, name, unit, peer), row in newest.items():
        machine = row["machine"].get("gpu") or row["machine"]["cpu"]
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else f"{row['value']:,}"
        lines.append(f"| {benchmark} | {name} | {value} {unit} | {peer} | {row['ratio']:.2f} | {machine} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite the page, or check it."""
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        if page(text) != text:
            print("book/results.md is not what the rows say; run: python tools/results_page.py")
            return 1
        return 0
    PAGE.write_text(page(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
