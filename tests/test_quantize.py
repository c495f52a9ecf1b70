"""Weights in 8 and 4 bits: within half a step, whole in a file, and a trained model hardly notices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_transformers import MODELS, draw_tokens, models, read, seeds
from torch import nn

from lmtutorial.batches import Batch
from lmtutorial.checkpoint import load_model, save_checkpoint
from lmtutorial.metrics import evaluate
from lmtutorial.pretrained import load_pretrained
from lmtutorial.quantize import (
    QuantizedLinear,
    Scheme,
    load_quantized,
    quantize,
    save_quantized,
    weight_bytes,
)

schemes = st.builds(Scheme, bits=st.sampled_from([4, 8]), group=st.sampled_from([None, 2, 4, 8]))


def linear_of(weight, bias=None):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight
    return linear


def by_hand(weight, scheme):
    """Group by group, in numpy."""
    out = np.empty_like(weight)
    width = scheme.group or weight.shape[1]
    for row, values in enumerate(weight):
        for start in range(0, len(values), width):
            group = values[start : start + width]
            scale = np.abs(group).max() / scheme.largest
            integers = np.round(group / scale) if scale else np.zeros_like(group)
            out[row, start : start + width] = integers * scale
    return out


@settings(max_examples=300)
@given(schemes, st.integers(1, 5), st.integers(1, 3), seeds)
def test_weights_are_rounded_group_by_group_to_within_half_a_step(scheme, rows, groups, seed):
    torch.manual_seed(seed)
    weight = (
        torch.randn(rows, 8 * groups, dtype=torch.float64) * torch.randn(rows, 1, dtype=torch.float64).exp()
    )
    weight[torch.rand_like(weight) < 0.2] = 0
    small = QuantizedLinear.of(linear_of(weight), scheme)
    assert np.allclose(small.weight(), by_hand(weight.numpy(), scheme), atol=1e-12)
    steps = small.scale.repeat_interleave(weight.shape[1] // small.scale.shape[1], 1)
    assert ((small.weight() - weight).abs() <= steps / 2 + 1e-12).all()


@settings(max_examples=100)
@given(schemes, st.integers(1, 4), seeds)
def test_the_layer_is_the_linear_layer_of_its_rounded_weights(scheme, rows, seed):
    torch.manual_seed(seed)
    weight, bias, x = torch.randn(5, 16), torch.randn(5), torch.randn(2, rows, 16)
    linear = linear_of(weight, bias)
    linear.bias.data = bias
    small = QuantizedLinear.of(linear, scheme)
    torch.testing.assert_close(small(x), x @ small.weight().T + bias)
    assert small.integers.nbytes == weight.numel() * scheme.bits // 8


@settings(max_examples=100)
@given(schemes, st.sampled_from([torch.bfloat16, torch.float16]), st.floats(-12, 2), seeds)
def test_half_precision_weights_are_rounded_like_the_same_weights_in_float32(scheme, dtype, size, seed):
    torch.manual_seed(seed)
    weight, x = (torch.randn(4, 32) * 2**size).to(dtype), torch.randn(3, 32).to(dtype)
    small, exact = (
        QuantizedLinear.of(linear_of(weight), scheme),
        QuantizedLinear.of(linear_of(weight.float()), scheme),
    )
    assert small.integers.equal(exact.integers)
    assert small.scale.equal(exact.scale)
    assert small(x).dtype == dtype
    torch.testing.assert_close(small(x).float(), exact(x.float()), rtol=0.05, atol=0.05 * 2**size)


@settings(max_examples=60, deadline=None)
@given(models, st.sampled_from([(8, None), (4, None), (8, 2), (4, 2)]), seeds)
def test_a_file_gives_the_same_model_back(tmp_path_factory, model, scheme, seed):
    if scheme[0] == 4 and model.config.hidden % 2:
        return
    small = quantize(model, *scheme) if model.config.hidden % (scheme[1] or 1) == 0 else quantize(model)
    path = save_quantized(tmp_path_factory.mktemp("quantized") / "small.safetensors", small)
    tokens = draw_tokens(2, 6, seed)
    assert read(load_quantized(path), tokens, [4, 2]).equal(read(small, tokens, [4, 2]))
    with pytest.raises(ValueError, match="scale"):
        load_model(path)


def test_the_model_stays_as_it_was_and_the_embedding_in_full():
    model = MODELS[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = quantize(model)
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert small.embedding.weight.equal(model.embedding.weight)
    assert small.embedding.weight.data_ptr() != model.embedding.weight.data_ptr()
    assert isinstance(small.head, QuantizedLinear)
    assert not any(type(module) is nn.Linear for module in small.modules())


def test_bytes_are_a_quarter_and_an_eighth_beside_scales():
    linear = nn.Linear(256, 256, bias=False)
    whole, eight, four = (
        weight_bytes(linear),
        *(weight_bytes(QuantizedLinear.of(linear, scheme)) for scheme in (Scheme(8), Scheme(4, 32))),
    )
    assert (whole, eight, four) == (4 * 256**2, 256**2 + 4 * 256, 256**2 // 2 + 4 * 256 * 8)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bits is 3; it must be 8 or 4"):
        quantize(MODELS[0], bits=3)
    with pytest.raises(ValueError, match="group is 5"):
        quantize(MODELS[0], group=5)
    with pytest.raises(ValueError, match="rows of 16 weights do not divide"):
        quantize(MODELS[0], group=6)
    with pytest.raises(ValueError, match="NaN or infinite"):
        QuantizedLinear.of(linear_of(torch.tensor([[1.0, torch.inf]])), Scheme())
    with pytest.raises(TypeError, match=r"Embedding holds no nn\.Linear"):
        quantize(nn.Embedding(2, 2))
    with pytest.raises(ValueError, match="holds no quantized Transformer"):
        load_quantized(save_checkpoint(tmp_path / "plain.safetensors", model=MODELS[0]))
    with pytest.raises(ValueError, match="has one scheme, this one has 0"):
        save_quantized(tmp_path / "plain.safetensors", MODELS[0])


# The first lines of "Twelfth Night": enough to see that a trained model still knows what it knew.
LINES = """DUKE. If music be the food of love, play on, Give me excess of it, that, surfeiting, The appetite
may sicken and so die. That strain again! It had a dying fall; O, it came o'er my ear like the sweet
sound That breathes upon a bank of violets, Stealing and giving odour! Enough, no more; 'Tis not so
sweet now as it was before. O spirit of love, how quick and fresh art thou! That, notwithstanding
thy capacity Receiveth as the sea, nought enters there, Of what validity and pitch soe'er, But falls
into abatement and low price Even in a minute. So full of shapes is fancy, That it alone is high
fantastical."""


def test_a_trained_model_loses_less_than_half_a_percent_with_8_bits():
    model, tokenizer, _ = load_pretrained("shakespeare-draft")
    ids = torch.tensor([tokenizer.encode(LINES)])
    batch = [Batch(ids[:, :-1], ids[:, 1:], None)]
    losses = {bits: evaluate(quantize(model, bits), batch).loss for bits in (8, 4)}
    whole = evaluate(model, batch).loss
    assert abs(losses[8] / whole - 1) < 0.005
    assert losses[4] / whole - 1 < 0.06
