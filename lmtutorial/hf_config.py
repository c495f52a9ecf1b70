"""The settings of GPT-2, Llama and Mistral, as Hugging Face's `config.json` writes them, to ours and back.

A setting that changes what the model computes and that ours lacks is refused; the many that do not (initial
spread, ids of special tokens, ...) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmtutorial.models.transformer import TransformerConfig

Config = Mapping[str, Any]

GPT2_ALLOWED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
LLAMA_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
    "attention_dropout": (0.0, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
ROPE_ALLOWED: dict[str, tuple[Any, ...]] = {"rope_type": ("default",), "partial_rotary_factor": (1.0, None)}


def read_config(config: Config) -> TransformerConfig:
    """Ours for a `config.json` whose `model_type` is "gpt2", "llama" or "mistral": Llama with a window.

    Raises ValueError for another kind, and for a setting that is missing, of another type, or not supported.

    >>> read_config({"model_type": "gpt2", "vocab_size": 65, "n_positions": 32, "n_embd": 48, "n_layer": 2,
    ...              "n_head": 4}).hidden
    192
    """
    readers = {"gpt2": _read_gpt2, "llama": _read_llama, "mistral": _read_mistral}
    if (kind := config.get("model_type")) not in readers:
        raise ValueError(f"model_type is {kind!r}; it must be one of {', '.join(readers)}")
    return readers[kind](config)


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of ours. Raises ValueError for an architecture of none of the three.

    Llama and Mistral have no dropout, so that it is left out there.

    >>> write_config(TransformerConfig.gpt2())["n_embd"], write_config(TransformerConfig(100))["model_type"]
    (768, 'llama')
    """
    c = config
    parts = (c.position, c.norm, c.mlp)
    if parts == ("learned", "layer", "gelu") and c.shared_heads == c.heads and not (c.qk_norm or c.window):
        return _write_gpt2(config)
    if parts == ("rotary", "rms", "swiglu") and not c.qk_norm:
        return _write_mistral(config) if c.window else _write_llama(config)
    raise ValueError(
        f"position={c.position!r}, norm={c.norm!r}, mlp={c.mlp!r}, heads={c.heads}, kv_heads={c.kv_heads}, "
        f"qk_norm={c.qk_norm}, window={c.window} has no Hugging Face layout: it must be GPT-2's (learned, "
        "layer, gelu, as many kv_heads as heads, no window) or Llama's (rotary, rms, swiglu), without qk_norm"
    )


def _read_gpt2(config: Config) -> TransformerConfig:
    _check(config, GPT2_ALLOWED)
    drops = {key: config.get(key, 0.0) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(drops.values())) > 1:
        raise ValueError(f"config.json has three rates of dropout, {drops}; they must be equal")
    return TransformerConfig(
        vocab_size=_whole(config, "vocab_size"),
        context=_whole(config, "n_positions"),
        width=_whole(config, "n_embd"),
        layers=_whole(config, "n_layer"),
        heads=_whole(config, "n_head"),
        hidden=_whole(config, "n_inner") if config.get("n_inner") is not None else None,
        dropout=_real(drops, "embd_pdrop"),
        position="learned",
        norm="layer",
        mlp="gelu",
        tied=bool(config.get("tie_word_embeddings", True)),
        norm_eps=_real(config, "layer_norm_epsilon", 1e-5),
    )


def _write_gpt2(c: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.context,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "activation_function": "gelu_new",
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), c.dropout),
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _read_mistral(config: Config) -> TransformerConfig:
    windowed = {"sliding_window": 4096, **config}  # 4096 is what `transformers` takes where nothing is said
    shape = _read_llama({**config, "sliding_window": None})
    if windowed["sliding_window"] is None:
        return shape
    return replace(shape, window=_whole(windowed, "sliding_window"))


def _read_llama(config: Config) -> TransformerConfig:
    _check(config, LLAMA_ALLOWED)
    rope = config.get("rope_parameters") or {}  # since version 5 of transformers; before, outside of it
    _check({"rope_type": "default", **rope}, ROPE_ALLOWED, "rope_parameters.")
    if others := rope.keys() - ROPE_ALLOWED.keys() - {"rope_theta"}:
        raise ValueError(f"config.json: rope_parameters has {sorted(others)}; only rope_theta is supported")
    width, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    if config.get("head_dim") is not None and config["head_dim"] * heads != width:
        raise ValueError(
            f"config.json: head_dim is {config['head_dim']}; it must be hidden_size / num_attention_heads, "
            f"{width} / {heads}"
        )
    shared = config.get("num_key_value_heads")
    return TransformerConfig(
        vocab_size=_whole(config, "vocab_size"),
        context=_whole(config, "max_position_embeddings"),
        width=width,
        layers=_whole(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads if shared is None else _whole(config, "num_key_value_heads"),
        hidden=_whole(config, "intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_base=_real({**config, **rope}, "rope_theta", 10_000.0),
        norm_eps=_real(config, "rms_norm_eps", 1e-6),
    )


def _write_llama(c: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": c.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _write_mistral(c: TransformerConfig) -> dict[str, Any]:
    kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": c.window}
    biases = ("attention_bias", "mlp_bias")  # Mistral has none, and no settings of the name
    return {k: v for k, v in _write_llama(c).items() if k not in biases} | kind


def _check(config: Config, allowed: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            listed = " or ".join(repr(value) for value in values)
            raise ValueError(f"config.json: {where}{key} is {config[key]!r}; it must be {listed}")


def _whole(config: Config, key: str) -> int:
    """A whole number that the configuration must have."""
    if key not in config:
        raise ValueError(f"config.json lacks {key}")
    if not isinstance(config[key], int) or isinstance(config[key], bool):
        raise ValueError(f"config.json: {key} is {config[key]!r}; it must be a whole number")
    return int(config[key])


def _real(config: Config, key: str, default: float = 0.0) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}; it must be a number")
    return float(value)
