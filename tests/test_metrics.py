"""Evaluation divides totals once, loses no context at seams, and leaves the model as it was."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.batches import StreamBatches, WindowBatches
from lmtutorial.metrics import Evaluation, evaluate
from lmtutorial.models.lstm import LSTM, LSTMConfig

TOKENS = torch.randint(20, (101,), generator=torch.Generator().manual_seed(0))


def tiny(**config):
    torch.manual_seed(0)
    return LSTM(LSTMConfig(vocab_size=20, width=8, **config))


@settings(max_examples=20)
@given(st.integers(1, 30))
def test_a_single_stream_costs_the_same_however_it_is_cut(time):
    model = tiny(layers=2)
    whole = evaluate(model, StreamBatches(TOKENS, 1, 100))
    cut = evaluate(model, StreamBatches(TOKENS, 1, time))
    assert cut.tokens == whole.tokens == 100
    assert cut.nats == pytest.approx(whole.nats, rel=1e-5)


def test_the_loss_is_total_nats_over_total_tokens_not_a_mean_of_means():
    model = tiny()
    batches = list(WindowBatches(TOKENS, 3, 7))  # the last batch holds fewer targets
    result = evaluate(model, batches)
    each = [evaluate(model, [batch]) for batch in batches if (batch.targets >= 0).any()]
    assert len({one.tokens for one in each}) > 1
    assert result.loss == pytest.approx(sum(e.nats for e in each) / sum(e.tokens for e in each), rel=1e-6)
    assert result.loss != pytest.approx(np.mean([one.loss for one in each]), rel=1e-9)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    assert evaluate(model, StreamBatches(TOKENS, 2, 9)).perplexity == pytest.approx(20, rel=1e-5)


def test_bytes_are_those_of_the_targets():
    token_bytes = np.arange(20)
    result = evaluate(tiny(), StreamBatches(TOKENS, 3, 9), token_bytes=token_bytes)
    assert result.bytes == int(TOKENS[1:].sum())
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / result.bytes)


def test_dropout_is_off_inside_and_back_on_after():
    model = tiny(dropout=0.5).train()
    first, second = (evaluate(model, StreamBatches(TOKENS, 2, 9)).nats for _ in range(2))
    assert first == second
    assert model.training


def test_no_target_and_no_byte_count_are_clear_errors():
    with pytest.raises(ValueError, match="no target"):
        evaluate(tiny(), [])
    with pytest.raises(ValueError, match="token_bytes"):
        _ = Evaluation(1.0, 1).bits_per_byte
