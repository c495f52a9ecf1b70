"""The mixture of a network and an n-gram model is a distribution, well weighted, and obeys the contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.batches import WindowBatches
from lmtutorial.metrics import evaluate
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.mixture import Mixture, fit_weights
from lmtutorial.models.ngram import NGram

VOCAB = 9
TEXT = torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.cat([TEXT[40:90], torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(1))])


def parts(seed=0, order=3):
    torch.manual_seed(seed)
    lstm = LSTM(LSTMConfig(VOCAB, width=8)).eval()
    torch.nn.init.normal_(lstm.head.weight, std=2.0)
    return lstm, NGram.train(TEXT, order=order, vocab_size=VOCAB)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 4), st.data())
def test_each_row_is_the_weighted_mean_by_the_length_of_the_match(seed, order, data):
    lstm, ngram = parts(seed, order)
    weights = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=order, max_size=order)))
    tokens = torch.randint(VOCAB, (2, 6))
    rows = Mixture(lstm, ngram, weights)(tokens).exp()
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 6))
    texts = {tuple(TEXT[i : i + n].tolist()) for n in range(order) for i in range(len(TEXT) - n + 1)}
    p, q = lstm(tokens).softmax(-1), ngram(tokens).exp()
    for b in range(2):
        for t in range(6):
            seen = [
                n
                for n in range(min(t + 1, order - 1) + 1)
                if tuple(tokens[b, t + 1 - n : t + 1].tolist()) in texts
            ]
            a = weights[max(seen)]
            torch.testing.assert_close(rows[b, t], (1 - a) * p[b, t] + a * q[b, t], atol=1e-5, rtol=1e-4)


def test_fitted_weights_are_better_than_either_part_and_than_any_weights_nearby():
    lstm, ngram = parts()
    batches = WindowBatches(HELD_OUT, batch=3, time=10)
    weights = fit_weights(lstm, ngram, batches, steps=300)

    def loss(weights):
        return evaluate(
            Mixture(lstm, ngram, weights.clamp(0, 1)), WindowBatches(HELD_OUT, batch=3, time=10)
        ).loss

    best = loss(weights)
    assert best < min(loss(torch.zeros(3)), loss(torch.ones(3)))
    for nudge in torch.eye(3) * 0.05:
        assert best <= loss(weights + nudge) + 1e-6
        assert best <= loss(weights - nudge) + 1e-6


def test_other_vocabularies_and_weights_are_refused():
    lstm, ngram = parts()
    with pytest.raises(ValueError, match="the vocabularies differ: 5 and 9"):
        Mixture(LSTM(LSTMConfig(5, width=4)), ngram, torch.zeros(3))
    for weights in (torch.zeros(2), torch.tensor([0.0, 0.0, 1.5])):
        with pytest.raises(ValueError, match="weights must be 3 numbers from 0 to 1"):
            Mixture(lstm, ngram, weights)
