"""The Transformer equals its mathematics written out, its cache leaves no trace, it starts as published."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cache_laws import check_going_back, check_pieces
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.models.kernels import RMSNorm, attend
from lmtutorial.models.transformer import Transformer, TransformerConfig, rotate

law = settings(max_examples=60, deadline=None)


@st.composite
def configs(draw):
    kv_heads, group, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    heads = kv_heads * group
    return TransformerConfig(
        vocab_size=draw(st.integers(2, 20)),
        context=draw(st.integers(9, 20)),
        width=heads * size,
        layers=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        dropout=draw(st.sampled_from([0.0, 0.5])),
        position=draw(st.sampled_from(["learned", "rotary"])),
        norm=draw(st.sampled_from(["layer", "rms"])),
        mlp=draw(st.sampled_from(["gelu", "swiglu", "relu2"])),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 8)),
    )


def random_model(config, seed, dtype=torch.float64):
    """Weights large enough that everything read matters; a fresh model adds almost nothing to its stream."""
    torch.manual_seed(seed)
    model = Transformer(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + (parameter.dim() == 1))
    return model


def written_out(model, tokens):
    """The forward pass of one row in plain loops over heads and positions, without a fused kernel."""
    c, state = model.config, model.state_dict()

    def norm(x, name):
        if c.norm == "layer" and "q_norm" not in name and "k_norm" not in name:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * state[f"{name}.weight"]
        return x + state.get(f"{name}.bias", 0.0)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    def turned(x, position):
        half = c.head_size // 2
        angle = position * c.rope_base ** (-torch.arange(half, dtype=x.dtype) * 2 / c.head_size)
        turned = torch.view_as_real(
            torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=x.dtype), angle)
        )
        return turned.T.flatten()

    x_TC = state["embedding.weight"][tokens]
    if c.position == "learned":
        x_TC = x_TC + state["position.table.weight"][: len(tokens)]
    for layer in range(c.layers):
        name = f"blocks.{layer}"
        qkv = linear(norm(x_TC, f"{name}.attention_norm"), f"{name}.attention.qkv")
        q, k, v = (
            p.unflatten(-1, (-1, c.head_size))
            for p in qkv.split([c.width, *[c.kv_heads * c.head_size] * 2], -1)
        )
        if c.qk_norm:
            q, k = norm(q, f"{name}.attention.q_norm"), norm(k, f"{name}.attention.k_norm")
        rows = []
        for t in range(len(tokens)):
            heads = []
            for h in range(c.heads):
                shared = h // (c.heads // c.kv_heads)
                turn = turned if c.position == "rotary" else lambda x, _: x
                seen = range(max(0, t + 1 - (c.window or len(tokens))), t + 1)
                scores = [turn(q[t, h], t) @ turn(k[s, shared], s) / math.sqrt(c.head_size) for s in seen]
                heads.append(torch.stack(scores).softmax(0) @ v[seen.start : t + 1, shared])
            rows.append(torch.cat(heads))
        x_TC = x_TC + linear(torch.stack(rows), f"{name}.attention.out")
        up = linear(norm(x_TC, f"{name}.mlp_norm"), f"{name}.mlp.up")
        if c.mlp == "gelu":
            up = 0.5 * up * (1 + (math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)).tanh())
        elif c.mlp == "relu2":
            up = up.clamp_min(0) ** 2
        else:
            gate, up = up.chunk(2, -1)
            up = gate * gate.sigmoid() * up
        x_TC = x_TC + linear(up, f"{name}.mlp.down")
    return norm(x_TC, "norm") @ state["head.weight"].T


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(0, 99))
def test_the_model_equals_its_mathematics_written_out_in_loops(config, seed):
    model = random_model(config, seed)
    tokens = torch.randint(config.vocab_size, (7,))
    torch.testing.assert_close(model(tokens[None])[0], written_out(model, tokens), rtol=1e-5, atol=1e-6)


@law
@given(configs(), st.integers(0, 99), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(config, seed, pieces):
    model = random_model(config, seed)
    check_pieces(model, torch.randint(config.vocab_size, (2, sum(pieces))), pieces, config.context)


@law
@given(configs(), st.integers(0, 99), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_after_truncation_and_reordering_the_rows_go_on_as_if_nothing_more_had_been_read(config, seed, keep):
    check_going_back(random_model(config, seed), keep, seed)


@law
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_the_plain_attention_of_cpu_training_equals_torchs(batch, kv_heads, group, time, size, seed):
    torch.manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, time, size)
    k, v = torch.randn(2, batch, kv_heads, time, size)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    halves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(attend(*halves).float(), exact, atol=0.05, rtol=0.05)
    wholes = [x.requires_grad_() for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wholes, is_causal=True, enable_gqa=True)
    direction = torch.randn_like(exact)
    wanted = torch.autograd.grad((exact * direction).sum(), wholes)
    got = torch.autograd.grad((attend(*halves).float() * direction).sum(), halves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.1, rtol=0.1)


@law
@given(st.integers(1, 5), st.integers(1, 33), st.integers(0, 99))
def test_rms_norm_equals_torchs_in_value_and_gradient(rows, size, seed):
    torch.manual_seed(seed)
    ours, torchs = RMSNorm(size).double(), torch.nn.RMSNorm(size, 1e-5).double()
    ours.weight.data.normal_()
    torchs.weight.data.copy_(ours.weight.data)
    x = torch.randn(2, rows, size, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, rows, size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours(x.detach()), torchs(x))  # without a gradient it takes another way
    got = torch.autograd.grad((ours(x) * direction).sum(), [x, ours.weight])
    wanted = torch.autograd.grad((torchs(x) * direction).sum(), [x, torchs.weight])
    torch.testing.assert_close(got, wanted)


@law
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 14), st.integers(0, 99))
def test_turned_queries_and_keys_see_only_their_distance(t, s, shift, seed):
    torch.manual_seed(seed)
    rotary = Transformer(TransformerConfig(vocab_size=2, context=20, width=8, heads=1)).position
    q, k = torch.randn(2, 8)

    def product(at, other):
        _, angles = rotary(None, torch.tensor([[at, other]]))
        cos, sin = (a[0, 0] for a in angles)
        return rotate(q, (cos[0], sin[0])) @ rotate(k, (cos[1], sin[1]))

    torch.testing.assert_close(product(t, s), product(t + shift, s + shift), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [TransformerConfig.gpt2(width=96, layers=6, heads=4), TransformerConfig(500, width=96)]
)
def test_weights_start_as_published(config):
    torch.manual_seed(0)
    model = Transformer(config)
    small = 0.02 / math.sqrt(2 * config.layers) if config.norm == "layer" else 0.0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            wanted = (
                0.01
                if "position" in name
                else small
                if name.endswith(("out.weight", "down.weight"))
                else 0.02
            )
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05)
            assert parameter.mean().item() == pytest.approx(0, abs=0.001)


def test_the_smallest_gpt2_has_124_million_parameters():
    with torch.device("meta"):
        model = Transformer(TransformerConfig.gpt2())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_a_compiled_model_keeps_its_names_and_its_logits():
    config = TransformerConfig(11, context=8, width=16)
    model = random_model(config, 0, torch.float32)
    names, tokens = list(model.state_dict()), torch.randint(11, (2, 8))
    before = model(tokens)
    model.compile(backend="eager")
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(tokens), before)


def test_a_token_does_not_see_those_after_it():
    model = random_model(TransformerConfig(11, context=8, width=16), 0)
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_too_many_tokens_are_refused_with_both_numbers():
    model = Transformer(TransformerConfig(11, context=8, width=16))
    with pytest.raises(ValueError, match="9 tokens are over the context of 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    for max_len in (None, 9):
        with pytest.raises(ValueError, match=f"max_len {max_len} .* context of 8"):
            model.new_cache(1, max_len)
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="at most 4 tokens a row, 5 are needed"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache)
    assert cache.lengths.tolist() == [0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("context", 0),
        ("layers", -1),
        ("heads", 3),
        ("kv_heads", 3),
        ("dropout", 1.0),
        ("position", "absolute"),
        ("norm", "batch"),
        ("mlp", "tanh"),
        ("norm_eps", 0.0),
        ("rope_base", math.inf),
        ("window", 0),
    ],
)
def test_a_bad_shape_is_refused_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"{value}"):
        TransformerConfig(**{"vocab_size": 9, "width": 64, field: value})


def test_a_config_can_be_saved_and_read():
    config = TransformerConfig(50, width=64, kv_heads=2)
    assert TransformerConfig(**dataclasses.asdict(config)) == config
