"""Laws of Hugging Face's layout: what goes out comes in, and `transformers` computes the same logits."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_bpe_published import OWN, SPECIALS, TEXT
from tokenizers import Tokenizer

from lmtutorial.bpe_library import BPETokenizer
from lmtutorial.bpe_published import PublishedBPE
from lmtutorial.hf_config import read_config, write_config
from lmtutorial.hugging_face import from_hf, load_hf, save_hf, to_hf
from lmtutorial.models.transformer import Transformer, TransformerConfig

TOLERANCE = 1e-4
transformers.utils.logging.disable_progress_bar()


@st.composite
def configs(draw, families=("gpt2", "llama", "mistral")):
    """Tiny configurations of the families, of every shape that they allow."""
    family = draw(st.sampled_from(families))
    heads = draw(st.sampled_from([1, 2, 4]))
    size = draw(st.sampled_from([4, 8] if family == "gpt2" else [2, 4, 8]))  # LayerNorm of 2 numbers: a sign
    shape = {
        "vocab_size": draw(st.integers(5, 60)),
        "context": draw(st.integers(12, 40)),
        "width": heads * size,
        "layers": draw(st.integers(1, 3)),
        "heads": heads,
        "hidden": draw(st.integers(1, 40)),
        "tied": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    }
    if family == "gpt2":
        return replace(
            TransformerConfig.gpt2(), **shape, kv_heads=heads, dropout=draw(st.sampled_from([0.0, 0.1]))
        )
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    return TransformerConfig(
        **shape,
        kv_heads=kv_heads,
        rope_base=draw(st.sampled_from([100.0, 10_000.0, 1e5])),
        window=draw(st.integers(1, 14)) if family == "mistral" else None,
    )


def random_model(config, seed=0):
    """A model whose every weight matters: far from its start, where much is 0 or 1."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def random_tokens(config, seed=0):
    return torch.randint(config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(seed))


def theirs(config, tensors):
    """The model of `transformers` with these settings and tensors."""
    kind = {
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
        "mistral": transformers.MistralForCausalLM,
    }[config["model_type"]]
    model = kind(kind.config_class(**config)).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    return model


@torch.no_grad()
def largest_difference(ours, hugging_face, tokens):
    return (ours(tokens) - hugging_face(tokens).logits).abs().max().item()


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@given(config=configs(), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_transformers_computes_our_logits_from_what_we_export(config, seed):
    model = random_model(config, seed)
    reference = theirs(*to_hf(model))
    assert largest_difference(model, reference, random_tokens(config, seed)) < TOLERANCE


@given(config=configs(), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_we_compute_the_logits_of_transformers_from_what_it_exports(config, seed):
    reference = theirs(*to_hf(random_model(config, seed)))
    model = from_hf(reference.config.to_dict(), reference.state_dict())  # with lm_head, though it is tied
    assert largest_difference(model, reference, random_tokens(config, seed)) < TOLERANCE
    assert not model.training


@given(config=configs(), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_what_is_exported_comes_in_again_and_what_came_in_is_exported_again(config, seed):
    model = random_model(config, seed)
    exported = to_hf(model)
    again = from_hf(*exported)
    assert again.config == replace(config, dropout=config.dropout if config.position == "learned" else 0.0)
    same(again.state_dict(), model.state_dict())
    assert (again.head.weight is again.embedding.weight) == config.tied
    config_again, tensors_again = to_hf(again)
    assert config_again == exported[0]
    same(tensors_again, exported[1])


@given(config=configs())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_folder_is_read_by_transformers_and_by_us(config, tmp_path_factory):
    folder = save_hf(model := random_model(config), tmp_path_factory.mktemp("hf"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert largest_difference(model, reference, random_tokens(config)) < TOLERANCE
    same(load_hf(folder).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_what_transformers_saves_is_read_whole_and_in_shards(name, tmp_path):
    reference = theirs(*to_hf(random_model(EXAMPLES[name])))
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        same(
            load_hf(tmp_path / folder).state_dict(),
            from_hf(*to_hf(random_model(EXAMPLES[name]))).state_dict(),
        )


EXAMPLES = {
    "gpt2": TransformerConfig.gpt2(vocab_size=50, context=16, width=16, layers=2, heads=4),
    "llama": TransformerConfig(vocab_size=50, context=16, width=16, layers=2, heads=4, kv_heads=2, hidden=24),
}
EXAMPLES["mistral"] = replace(EXAMPLES["llama"], window=5)
PREFIXES = {"gpt2": "transformer.", "llama": "model.", "mistral": "model."}
UNUSED = {
    "gpt2": ["h.0.attn.bias", "transformer.h.1.attn.masked_bias", "h.0.attn.masked_bias"],
    "llama": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
    "mistral": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
}
each_family = pytest.mark.parametrize("name", EXAMPLES)


@each_family
def test_names_without_their_prefix_and_buffers_of_old_files_are_read(name):
    model = random_model(EXAMPLES[name])
    config, tensors = to_hf(model)
    old = {key.removeprefix(PREFIXES[name]): tensor for key, tensor in tensors.items()}
    old |= dict.fromkeys(UNUSED[name], torch.ones(1, 1, 16, 16, dtype=torch.uint8))
    same(from_hf(config, old).state_dict(), model.state_dict())


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_another_precision_come_in_as_float32(name, dtype):
    config, tensors = to_hf(random_model(EXAMPLES[name]))
    rounded = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    model = from_hf(config, rounded)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    same(to_hf(model)[1], {key: tensor.float() for key, tensor in rounded.items()})


@each_family
def test_the_random_state_is_left_alone_and_no_weight_is_left_at_random(name):
    exported = to_hf(random_model(EXAMPLES[name]))
    before = torch.get_rng_state()
    for _ in range(3):
        same(from_hf(*exported).state_dict(), from_hf(*exported).state_dict())
    assert torch.equal(torch.get_rng_state(), before)


FAULTS = {
    "gpt2": {
        "h.1.mlp.c_fc.weight": (None, r"h\.1\.mlp\.c_fc\.weight \(16, 64\) is missing"),
        "h.0.attn.c_attn.weight": (
            torch.zeros(48, 16),
            r"h\.0\.attn\.c_attn\.weight has shape \(48, 16\) and should have \(16, 48\)",
        ),
        "h.2.ln_1.weight": (torch.ones(16), r"h\.2\.ln_1\.weight is unknown"),
        "wpe.weight": (torch.zeros(16, 16, dtype=torch.int8), r"wpe\.weight holds torch\.int8"),
        "lm_head.weight": (
            torch.zeros(50, 16),
            "lm_head.weight is not the embedding, though tie_word_embeddings",
        ),
    },
    "llama": {
        "layers.0.self_attn.k_proj.weight": (torch.zeros(16, 16), r"should have \(8, 16\)"),
        "layers.1.mlp.gate_proj.weight": (None, r"layers\.1\.mlp\.gate_proj\.weight \(24, 16\) is missing"),
        "layers.1.self_attn.q_proj.bias": (torch.zeros(16), r"layers\.1\.self_attn\.q_proj\.bias is unknown"),
        "norm.weight": (torch.ones(17), r"norm\.weight has shape \(17,\) and should have \(16,\)"),
        "layers.0.self_attn.rotary_emb.cos": (torch.ones(2), "rotary_emb.cos is unknown"),
    },
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in FAULTS for key in FAULTS[name]])
def test_a_tensor_that_does_not_fit_is_named(name, key):
    config, tensors = to_hf(Transformer(EXAMPLES[name]))
    tensor, message = FAULTS[name][key]
    full = key if key == "lm_head.weight" else PREFIXES[name] + key
    changed = {k: t for k, t in tensors.items() if k != full} | ({} if tensor is None else {full: tensor})
    with pytest.raises(ValueError, match=message):
        from_hf(config, changed)


@each_family
def test_every_fault_is_named_at_once(name):
    config, tensors = to_hf(Transformer(EXAMPLES[name]))
    with pytest.raises(ValueError, match=r"what\.weight is unknown") as caught:
        from_hf(config, {"what.weight": torch.zeros(1)})
    assert all(key.removeprefix(PREFIXES[name]) in str(caught.value) for key in [*tensors, "what.weight"])


@each_family
def test_a_name_that_comes_with_and_without_its_prefix_is_refused(name):
    config, tensors = to_hf(Transformer(EXAMPLES[name]))
    key = next(iter(tensors))
    with pytest.raises(ValueError, match=f"{key} comes with and without '{PREFIXES[name]}'"):
        from_hf(config, tensors | {key.removeprefix(PREFIXES[name]): tensors[key]})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'; it must be 'gelu_new' or"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True; .* False",
        ),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"attn_pdrop": 0.2}, "three rates of dropout.*must be equal"),
        ("gpt2", {"n_layer": None}, "n_layer is None; it must be a whole number"),
        ("gpt2", {"n_head": "4"}, "n_head is '4'"),
        ("gpt2", {"n_head": 5}, "width is 16; it must be a multiple of heads, which is 5"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'; it must be a number"),
        ("gpt2", {"model_type": "gptj"}, "model_type is 'gptj'; it must be one of gpt2, llama"),
        ("gpt2", {"model_type": None}, "model_type is None"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu' or 'swish'"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is .*linear.*must be None",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_type is 'llama3'; it must be 'default'",
        ),
        ("llama", {"rope_parameters": {"factor": 8.0}}, r"rope_parameters has \['factor'\]"),
        ("llama", {"attention_bias": True}, "attention_bias is True; it must be False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"head_dim": 8}, "head_dim is 8; it must be hidden_size / num_attention_heads, 16 / 4"),
        ("llama", {"num_key_value_heads": 3}, "heads is 4; it must be a multiple of kv_heads, 3"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is .*bits"),
        ("llama", {"sliding_window": 8}, "sliding_window is 8"),
        ("mistral", {"sliding_window": 0}, "window is 0; it must be at least 1"),
        ("mistral", {"sliding_window": "8"}, "sliding_window is '8'; it must be a whole number"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_supported_is_named_with_what_is(name, changes, message):
    config, tensors = to_hf(Transformer(EXAMPLES[name]))
    with pytest.raises(ValueError, match=message):
        from_hf(config | changes, tensors)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"])
def test_a_setting_that_is_missing_is_named(key):
    config = write_config(EXAMPLES["llama"])
    del config[key]
    with pytest.raises(ValueError, match=f"config.json lacks {key}"):
        read_config(config)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("llama", {k: v}) for k, v in [("qk_norm", True), ("mlp", "relu2"), ("norm", "layer")]),
        ("llama", {"position": "learned"}),
        ("gpt2", {"window": 5}),
    ],
    ids=str,
)
def test_an_architecture_of_no_family_is_not_exported(name, changes):
    with pytest.raises(ValueError, match=r"has no Hugging Face layout: it must be GPT-2's"):
        to_hf(Transformer(replace(EXAMPLES[name], **changes)))


@pytest.mark.parametrize(("said", "window"), [({}, 4096), ({"sliding_window": None}, None)], ids=str)
def test_a_mistral_of_which_no_window_is_said_has_that_of_transformers(said, window):
    config = write_config(EXAMPLES["mistral"])
    del config["sliding_window"]
    assert read_config(config | said).window == window
    assert transformers.MistralConfig(**config | said).sliding_window == window


class Trap:
    """Something that leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_never_opened(tmp_path):
    folder = save_hf(Transformer(EXAMPLES["gpt2"]), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"only as a pickle, pytorch_model\.bin\. Unpickling can run code"):
        load_hf(folder)
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def folder(tmp_path):
    return save_hf(Transformer(EXAMPLES["llama"]), tmp_path / "model")


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_hf(folder.parent)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json"):
        load_hf(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100, b"\xff" * 8 + b"{}"])
def test_a_damaged_file_is_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_hf(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_configuration_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        load_hf(folder)


def test_an_index_names_files_of_its_own_folder_that_are_there(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    names = dict.fromkeys(tensors, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"names '\.\./outside\.safetensors'; the files lie in the folder"):
        load_hf(folder)
    names = dict.fromkeys(tensors, "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(FileNotFoundError, match=r"lacks part\.safetensors"):
        load_hf(folder)
    save_file(tensors, folder / "part.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "twice.safetensors")
    both = names | {"lm_head.weight": "twice.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": both}))
    with pytest.raises(ValueError, match=r"twice\.safetensors holds model\.norm\.weight, which another file"):
        load_hf(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    same(load_hf(folder).state_dict(), from_hf(*to_hf(load_hf(folder))).state_dict())


@pytest.mark.parametrize("published", [False, True])
def test_a_tokenizer_is_saved_for_the_library_too(published, tmp_path):
    tokenizer = BPETokenizer.train(TEXT, 300, specials=SPECIALS)
    if published:
        state = json.loads(OWN.to_library().to_str())["model"]
        vocabulary = {name: i + 3 for name, i in state["vocab"].items()} | {
            n: i for i, n in enumerate(SPECIALS)
        }
        options = {"specials": SPECIALS, "split_digits": True, "ends_with": "<|im|>"}
        tokenizer = PublishedBPE.from_vocabulary(vocabulary, state["merges"], **options)
    model = Transformer(replace(EXAMPLES["llama"], vocab_size=tokenizer.vocab_size))
    folder = save_hf(model, tmp_path, tokenizer)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<|im_end|>1234 lower<|im|>" + TEXT + "<|endoftext|>"
    assert library.encode(text).ids == tokenizer.encode(text, specials=True)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.eos
