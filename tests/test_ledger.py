"""The ledger holds whole rows, chapters quote what it holds, and a recipe runs from a seed to a value."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from lmtutorial import repro
from lmtutorial.cli import main
from lmtutorial.ledger import read_results, record, result
from lmtutorial.repro import RECIPES, CharacterRun, Recipe, reproduce

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "book").rglob("*.ipynb") if "_build" not in path.parts)
NUMBER = re.compile(r"\d+\.\d+")


def test_every_stored_result_has_a_recipe_with_its_seeds_and_settings():
    for name, row in read_results().items():
        assert name in RECIPES
        assert (row.seeds, row.config, row.unit) == (
            RECIPES[name].seeds,
            RECIPES[name].config,
            RECIPES[name].unit,
        )


def test_every_recipe_has_a_stored_result():
    assert set(read_results()) == set(RECIPES)


def test_a_recipe_with_a_spread_has_at_least_three_seeds():
    assert all(len(recipe.seeds) in (1, *range(3, 10)) for recipe in RECIPES.values())


def stated(cell):
    """The decimal numbers in what a cell printed."""
    texts = ["".join(out.get("text", "")) + "".join(out.get("data", {}).get("text/plain", "")) +
             "".join(out.get("data", {}).get("text/markdown", "")) for out in cell["outputs"]]  # fmt: skip
    return NUMBER.findall("\n".join(texts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_number_in_a_results_cell_of_a_chapter_has_a_row(path):
    rows = read_results()
    allowed = {
        number for name, row in rows.items() for number in NUMBER.findall(f"{row} {RECIPES[name].published}")
    }
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "results" in cell["metadata"].get("tags", []):
            assert stated(cell), "a results cell that states nothing"
            assert set(stated(cell)) <= allowed


def test_some_chapter_states_results():
    texts = [path.read_text(encoding="utf-8") for path in NOTEBOOKS]
    assert any('"results"' in text for text in texts)


def test_a_recorded_result_reads_back_and_the_newest_row_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    record("a", [2.0], [0], unit="nats", config="x", seconds=1.0, path=path)
    new = record("a", [1.0, 1.2, 1.4], [0, 1, 2], unit="nats", config="x", seconds=2.0, path=path)
    assert read_results(path) == {"a": new}
    assert str(new) == "1.200 ± 0.200"
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"line 3 of .* is no result"):
        read_results(path)


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [float("nan")]])
def test_values_that_do_not_fit_their_seeds_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match="1 seeds need as many finite values"):
        record("a", values, [0], unit="nats", config="", seconds=1.0, path=tmp_path / "results.jsonl")
    assert not (tmp_path / "results.jsonl").exists()


def test_a_name_without_a_row_is_refused_with_those_that_have_one():
    with pytest.raises(ValueError, match="no result 'tiny'; it has"):
        result("tiny")
    with pytest.raises(ValueError, match="there is no result 'tiny'; there are tiny-shakespeare"):
        reproduce("tiny")


def test_the_command_runs_a_recipe_prints_it_beside_the_stored_row_and_records_on_request(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "results.jsonl"
    path.touch()
    recipe = Recipe(
        "what",
        "nats",
        lambda seed: 1.5 + seed,
        "settings",
        seeds=(0, 1, 2),
        published="1.9",
        source="a paper",
    )
    monkeypatch.setattr(repro, "RECIPES", {"mine": recipe})
    monkeypatch.setattr("lmtutorial.cli.RECIPES", {"mine": recipe})
    monkeypatch.setattr("lmtutorial.cli.read_results", lambda: read_results(path))
    monkeypatch.setattr("lmtutorial.cli.record", lambda *a, **k: record(*a, **k, path=path))
    assert main(["repro", "mine", "--record"]) == 0
    printed = capsys.readouterr().out
    assert "seed 1: 2.5000" in printed
    assert "stored: not made yet; published: 1.9 (a paper)" in printed
    assert read_results(path)["mine"].values == (1.5, 2.5, 3.5)
    assert main(["repro"]) == 0
    assert "2.500 ± 1.000 nats" in capsys.readouterr().out
    assert main(["repro", "yours"]) == 2


def test_a_character_run_trains_mixes_and_scores_the_whole_part(monkeypatch):
    class Small:
        name = "small"

        def text(self, split):
            words = random.Random(split).choices(["to be ", "or not ", "the question ", "is "], k=400)
            return "".join(words)

    monkeypatch.setattr(repro, "load_corpus", lambda _name: Small())
    run = CharacterRun(0.3, width=8, layers=1, heads=1, time=16, batch=4, order=3, tuning=0.1)
    mixed = run(0)
    alone = dataclasses.replace(run, order=0)(0)
    assert 0 < mixed < alone  # counting learns more in a third of a second than such a network
