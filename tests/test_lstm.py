"""The LSTM is torch's, its cell is written out, and its cache goes back without a trace."""

import pytest
import torch
from cache_laws import check_going_back, check_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmtutorial.models.lstm import LSTM, LSTMConfig, lstm_step

configs = st.builds(
    LSTMConfig,
    vocab_size=st.integers(2, 20),
    width=st.integers(1, 12),
    layers=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.5]),
    tied=st.booleans(),
)
law = settings(max_examples=60)


def random_model(config, seed):
    torch.manual_seed(seed)
    return LSTM(config).eval(), torch.Generator().manual_seed(seed)


@law
@given(st.integers(1, 5), st.integers(1, 16), st.integers(0, 99))
def test_the_cell_equals_torchs(batch, width, seed):
    torch.manual_seed(seed)
    cell = nn.LSTMCell(width, width)
    x, h, c = torch.randn(3, batch, width)
    ours = lstm_step(x, h, c, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    for one, other in zip(ours, cell(x, (h, c)), strict=True):
        torch.testing.assert_close(one, other)


@law
@given(configs, st.integers(0, 99))
def test_the_model_equals_embedding_then_nn_lstm_then_linear(config, seed):
    model, draw = random_model(config, seed)
    tokens = torch.randint(config.vocab_size, (3, 7), generator=draw)
    plain = model.lstm(model.embedding(tokens))[0] @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(tokens), plain)


@law
@given(configs, st.integers(0, 99), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(config, seed, pieces, endless):
    model, draw = random_model(config, seed)
    tokens = torch.randint(config.vocab_size, (2, sum(pieces)), generator=draw)
    check_pieces(model, tokens, pieces, None if endless else sum(pieces))


@law
@given(configs, st.integers(0, 99), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_after_truncation_and_reordering_the_rows_go_on_as_if_nothing_more_had_been_read(config, seed, keep):
    check_going_back(random_model(config, seed)[0], keep, seed)


def test_a_detached_stream_sends_no_gradient_past_the_seam():
    model = LSTM(LSTMConfig(vocab_size=9, width=4))
    cache = model.new_cache(1, None)
    model(torch.tensor([[1]]), cache)
    cache.detach()
    model(torch.tensor([[2]]), cache)[..., 0].sum().backward()
    untied = LSTM(LSTMConfig(vocab_size=9, width=4, tied=False))
    cache = untied.new_cache(1, None)
    untied(torch.tensor([[1]]), cache)
    cache.detach()
    untied(torch.tensor([[2]]), cache).sum().backward()
    assert untied.embedding.weight.grad[1].abs().sum() == 0
    assert untied.embedding.weight.grad[2].abs().sum() > 0


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not():
    tied, untied = (LSTM(LSTMConfig(vocab_size=9, width=4, tied=t)) for t in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 36


def test_an_endless_stream_cannot_go_back():
    with pytest.raises(ValueError, match="new_cache"):
        LSTM(LSTMConfig(vocab_size=9, width=4)).new_cache(1, None).truncate(torch.tensor([0]))


@pytest.mark.parametrize(
    ("field", "value"), [("vocab_size", 0), ("width", 0), ("layers", -1), ("dropout", 1.0), ("dropout", -0.1)]
)
def test_a_bad_shape_is_refused_with_its_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        LSTMConfig(**{"vocab_size": 9, field: value})
