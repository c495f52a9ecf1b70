"""Transformers in the layout of Hugging Face's hub: the tensors of GPT-2, Llama, Mistral to ours and back.

A folder holds `config.json` and `model.safetensors` (or several of these, and an index). What differs:

- GPT-2 keeps the matrices of its blocks as (in, out); ours, and Llama's, are (out, in).
- Llama keeps queries, keys and values apart, and the MLP's gate and up. Ours lie on top of each other in one
  matrix: one product instead of three, and the same numbers.
- A head that is tied to the embedding is not in the file.

Everything is strict: a tensor too many or too few, another shape, a setting that ours lacks is a ValueError.
Pickles (`pytorch_model.bin`) are never read, since unpickling can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmtutorial.bpe_library import BPETokenizer
from lmtutorial.hf_config import read_config, write_config
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.tensorfile import write_whole


class Layout(NamedTuple):
    """The names of a family's tensors, by ours."""

    prefix: str
    """What names begin with in files of the whole model, the head's excepted."""
    block: str
    """What the names in a block begin with."""
    outside: dict[str, str]
    inside: dict[str, tuple[str, ...]]
    """The modules of a block. Several names: the rows of the first, below them those of the next."""
    parts: tuple[str, ...]
    turned: bool
    """Whether the matrices in blocks are (in, out)."""
    unused: re.Pattern[str]
    """What some files hold beside weights: masks, and angles of rotary positions."""


LAYOUTS = {
    "gpt2": Layout(
        prefix="transformer.",
        block="h.{}.",
        outside={
            "embedding.weight": "wte.weight",
            "position.table.weight": "wpe.weight",
            "norm.weight": "ln_f.weight",
            "norm.bias": "ln_f.bias",
        },
        inside={
            "attention_norm": ("ln_1",),
            "attention.qkv": ("attn.c_attn",),
            "attention.out": ("attn.c_proj",),
            "mlp_norm": ("ln_2",),
            "mlp.up": ("mlp.c_fc",),
            "mlp.down": ("mlp.c_proj",),
        },
        parts=("weight", "bias"),
        turned=True,
        unused=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
    ),
    "llama": Layout(
        prefix="model.",
        block="layers.{}.",
        outside={"embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight"},
        inside={
            "attention_norm": ("input_layernorm",),
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.out": ("self_attn.o_proj",),
            "mlp_norm": ("post_attention_layernorm",),
            "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down": ("mlp.down_proj",),
        },
        parts=("weight",),
        turned=False,
        unused=re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    ),
}
LAYOUTS["mistral"] = LAYOUTS["llama"]


def from_hf(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transformer:
    """The model of a parsed `config.json` and of tensors by name: on the CPU, in float32, evaluating.

    `config["model_type"]` is "gpt2", "llama" or "mistral". Names may lack their first part, "transformer." or
    "model.".

    Raises ValueError, naming every tensor that is missing, unknown or of another shape, or the setting that
    is not supported with its value and what is allowed.

    >>> model = Transformer(TransformerConfig.gpt2(vocab_size=65, context=16, width=32, layers=1, heads=4))
    >>> torch.equal(from_hf(*to_hf(model)).head.weight, model.head.weight)
    True
    """
    shape = read_config(config)
    layout = LAYOUTS[config["model_type"]]
    with _NoInitialization():
        model = Transformer(shape)
    theirs = {name.removeprefix(layout.prefix): name for name in tensors}
    places = _places(model, layout)
    faults = [
        f"{name} comes with and without {layout.prefix!r}" for name in tensors if name not in theirs.values()
    ]
    for name, place in places.items():
        faults += _fill(place, name, tensors[theirs[name]] if name in theirs else None)
    if shape.tied and "lm_head.weight" in theirs:
        if not torch.equal(tensors[theirs["lm_head.weight"]].float(), model.head.weight):
            faults.append("lm_head.weight is not the embedding, though tie_word_embeddings is true")
        places["lm_head.weight"] = model.head.weight
    faults += [f"{n} is unknown" for n in theirs if n not in places and not layout.unused.fullmatch(n)]
    if faults:
        raise ValueError(f"these are not the tensors of this {config['model_type']}: " + "; ".join(faults))
    return model.eval()


def to_hf(model: Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `config.json`, and copies of the tensors by the names that `transformers` gives them.

    Raises ValueError for an architecture that is not GPT-2's, Llama's or Mistral's.

    >>> config, tensors = to_hf(Transformer(TransformerConfig(vocab_size=65, width=32, heads=4, layers=1)))
    >>> config["model_type"], tensors["model.layers.0.self_attn.k_proj.weight"].shape
    ('llama', torch.Size([32, 32]))
    """
    config = write_config(model.config)
    layout = LAYOUTS[config["model_type"]]
    copies = {name: place.contiguous().clone() for name, place in _places(model, layout).items()}
    return config, {("" if n == "lm_head.weight" else layout.prefix) + n: t for n, t in copies.items()}


def load_hf(folder: str | Path) -> Transformer:
    """The model of a folder as `save_hf` or `save_pretrained` of `transformers` writes it.

    Raises FileNotFoundError; ValueError as `from_hf` does, for a damaged file, and for a folder with nothing
    but pickles.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            loaded = load_file(path)  # mapped into memory: no second copy beside the model's
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
        if twice := tensors.keys() & loaded.keys():
            raise ValueError(f"{path} holds {min(twice)}, which another file of the folder holds too")
        tensors |= loaded
    try:
        return from_hf(read_json(folder / "config.json"), tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def save_hf(model: Transformer, folder: str | Path, tokenizer: BPETokenizer | None = None) -> Path:
    """Write `config.json`, `model.safetensors` and, with a tokenizer, `tokenizer.json`; returns the folder.

    `AutoModelForCausalLM.from_pretrained(folder)` of `transformers` reads it, and so does `load_hf`.
    """
    from safetensors.torch import save

    folder = Path(folder)
    config, tensors = to_hf(model)
    if tokenizer is not None:
        library = tokenizer.to_library()
        library.add_special_tokens(list(tokenizer.specials))
        write_whole(folder / "tokenizer.json", library.to_str().encode())
        config["eos_token_id"] = tokenizer.eos
    write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    write_whole(folder / "config.json", json.dumps(config, indent=2).encode())
    return folder


def _places(model: Transformer, layout: Layout) -> dict[str, Tensor]:
    """Where in the model each of their tensors lies: views, in their shape, by name without the prefix."""
    c, own = model.config, model.state_dict()
    names = {ours: [theirs] for ours, theirs in layout.outside.items()}
    for i in range(c.layers):
        for ours, modules in layout.inside.items():
            for part in layout.parts:
                theirs = [f"{layout.block.format(i)}{module}.{part}" for module in modules]
                names[f"blocks.{i}.{ours}.{part}"] = theirs
    names |= {} if c.tied else {"head.weight": ["lm_head.weight"]}
    assert names.keys() == own.keys() - ({"head.weight"} if c.tied else set()), "the layout misses a tensor"
    return {
        name: place.T if layout.turned and place.dim() == 2 and ours.startswith("blocks.") else place
        for ours, theirs in names.items()
        for name, place in zip(theirs, own[ours].split(_rows(c, own[ours], len(theirs))), strict=True)
    }


def _rows(c: TransformerConfig, tensor: Tensor, parts: int) -> list[int]:
    """How many rows of ours each part of theirs has: queries, keys and values, or gate and up."""
    if parts == 3:
        return [c.width, c.shared_heads * c.head_size, c.shared_heads * c.head_size]
    return [len(tensor) // parts] * parts


def _fill(place: Tensor, name: str, tensor: Tensor | None) -> Iterator[str]:
    """Copy `tensor` to its place, or say what is wrong with it."""
    if tensor is None:
        yield f"{name} {tuple(place.shape)} is missing"
    elif tensor.shape != place.shape:
        yield f"{name} has shape {tuple(tensor.shape)} and should have {tuple(place.shape)}"
    elif not tensor.is_floating_point():
        yield f"{name} holds {tensor.dtype}, which is no floating-point type"
    else:
        place.copy_(tensor)


class _NoInitialization(TorchFunctionMode):
    """Where weights are filled anyway, drawing random ones first is most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that the index names."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if not (index := folder / "model.safetensors.index.json").is_file():
        if pickles := sorted(path.name for path in folder.glob("*.bin")):
            raise ValueError(
                f"{folder} holds its weights only as a pickle, {pickles[0]}. Unpickling can run code, so it "
                "is not read: take the safetensors file of the same model, or convert it where you trust it"
            )
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor {index.name}")
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}; the files lie in the folder itself")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which {index.name} names")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises FileNotFoundError, or ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content
