"""The arrows point down: each module imports only from those above it in one order, and heavy things late."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lmtutorial

PACKAGE = Path(lmtutorial.__file__).parent
FROM_TOP_TO_BOTTOM = """
    files.registry files.download files.pip_archive files.storage files.text corpora
    words bpe vocabulary bpe_library bpe_published tokenizers
    batches
    models.cache models.token_cache models.ngram_counts models.ngram_discounts models.ngram models.mixture
    models.lstm models.kv_cache models.sliding_cache models.kernels models.transformer models.stand_in
    losses metrics devices optim optimizer_groups schedules
    sharding distributed provenance tensorfile checkpoint quantize roofline native compiled
    hf_config hugging_face gguf_file pretrained
    train_config weight_average runs lost_process update resume train
    decode.noise decode.logits decode.rows decode.prompts decode.automaton decode.constraints decode.sampling
    decode.candidates decode.beam decode.tree decode.best_of decode.mcts
    decode.guesses decode.drafts decode.growing decode.speculative decode.text
    decoders prefix_cache request engine engine_thread search_thread completion serve
    plot_digest plots
    ledger repro commands build cli
"""
ORDER = FROM_TOP_TO_BOTTOM.split()


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.name != "__init__.py":
            yield name, path


def imports_of(path):
    """The modules of the package that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmtutorial."):
            yield node.module.removeprefix("lmtutorial.")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("lmtutorial.") for a in node.names if "lmtutorial." in a.name)


def test_every_module_has_its_place_in_the_order():
    assert sorted(name for name, _ in modules()) == sorted(ORDER)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_a_module_imports_only_what_stands_above_it(name, path):
    above = ORDER[: ORDER.index(name)]
    assert [other for other in imports_of(path) if other not in above] == []


def test_decoders_know_no_model():
    models = {name for name in ORDER if name.startswith("models.") and name != "models.cache"}
    for name, path in modules():
        if name.startswith("decode."):
            assert not models & set(imports_of(path))


def test_importing_models_training_and_decoding_loads_no_heavy_extra():
    code = (
        "import sys, lmtutorial.train, lmtutorial.decode.sampling, lmtutorial.pretrained\n"
        "heavy = {'matplotlib', 'tokenizers', 'sacrebleu', 'transformers', 'tyro', 'IPython', 'gguf'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
