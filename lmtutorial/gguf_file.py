"""GGUF files, the format of llama.cpp: one file with settings, tokenizer and weights, mostly quantized.

The package `gguf` reads the file and undoes the quantization; nothing in it is executed. What differs from
Hugging Face's layout, into which a file is brought here:

- Llama's queries and keys have their rows in another order. llama.cpp's rotary positions turn the neighbors
  (x[2i], x[2i+1]); Hugging Face's, and ours, the halves (x[i], x[i + size/2]). Same angles, same product.
- GPT-2's matrices are (out, in).

Source: the GGUF specification, and `convert_hf_to_gguf.py`, in llama.cpp's repository, 2023.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmtutorial.bpe_published import PublishedBPE
from lmtutorial.hugging_face import from_hf
from lmtutorial.models.transformer import Transformer

if TYPE_CHECKING:
    from gguf import GGUFReader

# Hugging Face's name of each setting; any other setting of the model is refused.
SETTINGS: dict[str, dict[str, str]] = {
    "gpt2": {
        "block_count": "n_layer",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "llama": {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "rope.dimension_count": "head_dim",
        "rope.freq_base": "rope_theta",
        "vocab_size": "vocab_size",
    },
}

# Hugging Face's name of each module.
NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    "llama": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
}

# Whether digits are cut apart, by `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {"gpt-2": False, "smollm": True}


def load_gguf(path: str | Path) -> Transformer:
    """The model of a GGUF file, dequantized to float32. GPT-2 and Llama are read.

    Raises FileNotFoundError, ImportError where the package `gguf` is missing; ValueError for a file that is
    damaged or holds something else, and as `from_hf` does.
    """
    return gguf_model(open_gguf(path))


def open_gguf(path: str | Path) -> GGUFReader:
    """The opened file: settings in its `fields`, weights, still quantized, in its `tensors`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files are read by the package gguf: pip install gguf") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no GGUF file: {error}") from error


def gguf_model(reader: GGUFReader) -> Transformer:
    """The model of an open file; otherwise as `load_gguf`."""
    kind = _value(reader, "general.architecture")
    if kind not in SETTINGS:
        raise ValueError(f"general.architecture is {kind!r}; it must be one of {', '.join(SETTINGS)}")
    tensors = _Tensors(reader, kind)
    config: dict[str, Any] = {"model_type": kind, "tie_word_embeddings": "lm_head.weight" not in tensors}
    for key in reader.fields:
        if not key.startswith(f"{kind}."):
            continue
        if (name := SETTINGS[kind].get(key.removeprefix(f"{kind}."))) is None:
            raise ValueError(f"{key} is {_value(reader, key)!r}, which is not supported")
        value = _value(reader, key)
        if config.setdefault(name, value) != value:
            raise ValueError(f"{key} is {value!r}, but another setting says {config[name]!r}")
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    config.setdefault("vocab_size", 0 if embedding is None else int(embedding.shape[1]))
    queries = config.get("num_attention_heads")
    tensors.heads = {"q": queries, "k": config.get("num_key_value_heads", queries)}
    return from_hf(config, tensors)


def gguf_tokenizer(reader: GGUFReader) -> PublishedBPE:
    """The tokenizer in an open file: byte-level BPE in the manner of GPT-2 or of SmolLM.

    Raises ValueError for a file without one, or with another kind.
    """
    kind, manner = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or manner not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r} and tokenizer.ggml.pre is {manner!r}; they must be 'gpt2' and "
            f"one of {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = _value(reader, "tokenizer.ggml.tokens")
    types = _value(reader, "tokenizer.ggml.token_type") or [1] * len(tokens)
    end = _value(reader, "tokenizer.ggml.eos_token_id")
    return PublishedBPE.from_vocabulary(
        {token: i for i, token in enumerate(tokens)},
        _value(reader, "tokenizer.ggml.merges"),
        specials=[token for token, type in zip(tokens, types, strict=True) if type == 3],  # 3: control
        split_digits=PRE_TOKENIZERS[manner],
        ends_with=None if end is None else tokens[end],
    )


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file in Hugging Face's names and layout, each dequantized when it is asked for."""

    def __init__(self, reader: GGUFReader, kind: str) -> None:
        self.kind, self.heads = kind, dict[str, Any]()
        self.found = {_hf_name(tensor.name, kind): tensor for tensor in reader.tensors}

    def __getitem__(self, name: str) -> Tensor:
        from gguf import dequantize

        tensor = self.found[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{name} is quantized as {tensor.tensor_type.name}, which gguf lacks") from error
        numbers = torch.from_numpy(values.astype(np.float32))
        if match := re.search(r"self_attn\.([qk])_proj", name):
            return halves_from_neighbors(numbers, self.heads[match[1]])
        in_block = name.startswith("transformer.h.")
        return numbers.T if self.kind == "gpt2" and in_block and numbers.dim() == 2 else numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def halves_from_neighbors(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head, (heads * size, width): first those of even index, then the odd ones.

    >>> halves_from_neighbors(torch.arange(8).view(8, 1), heads=2).flatten()
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _hf_name(name: str, kind: str) -> str:
    """Hugging Face's name for a tensor, or the name itself, which is then an unknown one."""
    block, module, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*?)(?:\.(weight|bias))?", name).groups()  # type: ignore[union-attr]
    if name == "output.weight":
        return "lm_head.weight"
    if module not in NAMES[kind] or part is None:
        return name
    inside = {"gpt2": f"transformer.h.{block}.", "llama": f"model.layers.{block}."}[kind]
    return f"{'' if block is None else inside}{NAMES[kind][module]}.{part}"


def _value(reader: GGUFReader, key: str) -> Any:
    """What the file says under `key`, or None."""
    field = reader.fields.get(key)
    value = None if field is None else field.contents()
    # a float32: 1e-05 comes as 9.999999747378752e-06
    return float(f"{value:.7g}") if isinstance(value, float) else value
