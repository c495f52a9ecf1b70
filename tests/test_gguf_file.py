"""Laws of GGUF files: what llama.cpp's converter would write comes in as `transformers` reads it."""

import json
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bpe_published import OWN, SPECIALS, TEXT, library
from test_hugging_face import (
    EXAMPLES,
    TOLERANCE,
    configs,
    largest_difference,
    random_model,
    random_tokens,
    same,
)

from lmtutorial.gguf_file import NAMES, SETTINGS, gguf_tokenizer, halves_from_neighbors, load_gguf, open_gguf
from lmtutorial.hugging_face import from_hf, to_hf


def neighbors_from_halves(rows, heads):
    """The order of rows that llama.cpp wants, as its converter makes it."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def gguf_name(name, kind):
    """llama.cpp's name for a tensor of Hugging Face."""
    modules = {theirs: ours for ours, theirs in NAMES[kind].items()} | {"lm_head": "output"}
    prefix, module, part = re.fullmatch(r"(.*\.\d+\.)?(.*)\.(\w+)", name).groups()
    block = "" if prefix is None else f"blk.{prefix.split('.')[-2]}."
    return f"{block}{modules[module]}.{part}"


def write(path, config, tensors, kind=Kind.F32, settings=(), more=()):
    """A file of a model in Hugging Face's layout, its matrices quantized where their rows are long enough."""
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    names = {ours: theirs for theirs, ours in reversed(SETTINGS[architecture].items())}
    for key, value in config.items():
        if key in names:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{names[key]}", value)
    for key, value in dict(settings).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        array = tensor.numpy()
        if match := re.search(r"([qk])_proj", name):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            array = neighbors_from_halves(array, heads)
        if architecture == "gpt2" and ".h." in name and array.ndim == 2:
            array = array.T
        fits = array.ndim == 2 and array.shape[1] % 32 == 0
        quantized = gguf.quantize(np.ascontiguousarray(array), kind if fits else Kind.F32)
        writer.add_tensor(gguf_name(name, architecture), quantized, raw_dtype=kind if fits else Kind.F32)
    for name, array in dict(more).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@given(config=configs(families=("gpt2", "llama")))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_llama_cpp_would_write_comes_in_as_it_was(config, tmp_path_factory):
    exported = to_hf(random_model(config))
    model = load_gguf(write(tmp_path_factory.mktemp("gguf") / "model.gguf", *exported))
    assert model.config.norm_eps == config.norm_eps  # though the file holds it in float32
    assert (model.config.layers, model.config.kv_heads) == (config.layers, config.kv_heads)
    same(model.state_dict(), from_hf(*exported).state_dict())


BIG = {
    "gpt2": {"n_embd": 32, "n_inner": 64},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
}


def quantizable(name):
    """A model of the family with rows of 32, which is what the formats group."""
    config = to_hf(random_model(EXAMPLES[name]))[0] | BIG[name]
    kind = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}[name]
    torch.manual_seed(0)
    tensors = kind(kind.config_class(**config)).state_dict()
    return config, {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0], ids=lambda k: k.name
)
@pytest.mark.parametrize("name", BIG)
def test_transformers_reads_the_same_model_from_the_same_file(name, kind, tmp_path):
    config, tensors = quantizable(name)
    path = write(tmp_path / "model.gguf", config, tensors, kind)
    model = load_gguf(path)
    given = (
        {"config": transformers.GPT2Config(**config)} if name == "gpt2" else {}
    )  # it reads only Llama's whole
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, **given
    ).eval()
    assert largest_difference(model, reference, random_tokens(model.config)) < TOLERANCE


@given(heads=st.integers(1, 4), pairs=st.integers(1, 5), width=st.integers(1, 3))
def test_the_order_of_rows_goes_back_and_forth(heads, pairs, width):
    rows = torch.randn(heads * pairs * 2, width)
    assert torch.equal(halves_from_neighbors(neighbors_from_halves(rows, heads), heads), rows)
    assert torch.equal(neighbors_from_halves(halves_from_neighbors(rows, heads), heads), rows)


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        (
            {"llama.rope.scaling.type": "linear"},
            {},
            r"llama\.rope\.scaling\.type is 'linear', which is not supp",
        ),
        ({"llama.expert_count": 8}, {}, r"llama\.expert_count is 8, which is not supported"),
        ({"llama.rope.dimension_count": 2}, {}, r"dimension_count is 2, but another setting says 4"),
        ({}, {"rope_freqs.weight": np.ones(2, np.float32)}, r"rope_freqs\.weight is unknown"),
        (
            {},
            {"blk.0.attn_q.bias": np.ones(16, np.float32)},
            r"layers\.0\.self_attn\.q_proj\.bias is unknown",
        ),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(settings, more, message, tmp_path):
    config, tensors = to_hf(random_model(EXAMPLES["llama"]))
    path = write(tmp_path / "model.gguf", config, tensors, settings=settings, more=more)
    with pytest.raises(ValueError, match=message):
        load_gguf(path)


def test_another_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture is 'mamba'; it must be one of gpt2, llama"):
        load_gguf(tmp_path / "other.gguf")


def test_a_missing_tensor_is_named(tmp_path):
    config, tensors = to_hf(random_model(EXAMPLES["llama"]))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight \(24, 16\) is missing"):
        load_gguf(write(tmp_path / "model.gguf", config, tensors))


def test_a_file_that_is_cut_short_or_no_gguf_or_not_there_is_named(tmp_path):
    path = write(tmp_path / "model.gguf", *to_hf(random_model(EXAMPLES["llama"])))
    whole = path.read_bytes()
    for length in (0, 3, 30, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.gguf is damaged, or no GGUF file"):
            load_gguf(path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match=r"model\.gguf is damaged, or no GGUF file"):
        load_gguf(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*other\.gguf"):
        load_gguf(tmp_path / "other.gguf")


def test_without_the_package_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from lmtutorial.gguf_file import load_gguf\n"
        "try: load_gguf('model.gguf')\n"
        "except ImportError as error: print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "GGUF files are read by the package gguf: pip install gguf"


def write_tokenizer(path, *, model="gpt2", pre="smollm"):
    vocabulary = {
        **OWN.to_library().get_vocab(),
        **{name: OWN.vocab_size + i for i, name in enumerate(SPECIALS)},
    }
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [tuple(merge) for merge in json.loads(OWN.to_library().to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(vocabulary["<|im|>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return vocabulary, merges


@pytest.mark.parametrize(("pre", "split_digits"), [("smollm", True), ("gpt-2", False)])
def test_the_tokenizer_of_a_file_is_the_librarys(pre, split_digits, tmp_path):
    vocabulary, merges = write_tokenizer(tmp_path / "tokenizer.gguf", pre=pre)
    tokenizer = gguf_tokenizer(open_gguf(tmp_path / "tokenizer.gguf"))
    theirs = library(vocabulary, merges, split_digits)
    assert tokenizer.encode(TEXT + "<|im|>", specials=True) == theirs.encode(TEXT + "<|im|>").ids
    assert tokenizer.eos == vocabulary["<|im|>"]


@pytest.mark.parametrize("changes", [{"model": "llama"}, {"pre": "qwen2"}], ids=str)
def test_another_kind_of_tokenizer_is_named(changes, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.gguf", **changes)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model is .* they must be 'gpt2' and one of"):
        gguf_tokenizer(open_gguf(tmp_path / "tokenizer.gguf"))
