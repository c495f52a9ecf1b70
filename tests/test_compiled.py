"""Compiled steps: the logits of the model itself, in one graph for all lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_transformers import (
    MODELS,
    SHAPES,
    VOCAB,
    draw_tokens,
    models,
    random_transformer,
    read,
    seeds,
    tokens_of,
)

from lmtutorial.compiled import compiled
from lmtutorial.decode.sampling import greedy, sample
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.quantize import quantize


class Counting:
    """A backend that runs a graph as it is, and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@settings(max_examples=6)
@given(models, st.integers(1, 3), seeds)
def test_compiled_steps_give_the_models_logits_in_one_graph(model, rows, seed):
    counting = Counting()
    fast, tokens = compiled(model, backend=counting), draw_tokens(rows, 12, seed)
    pieces = [5, *[1] * 7]
    torch.testing.assert_close(read(fast, tokens, pieces), read(model, tokens, pieces), atol=1e-4, rtol=1e-4)
    assert counting.graphs == 1


def test_one_graph_serves_all_lengths_caches_and_decoders_of_a_batch():
    torch._dynamo.reset()
    counting = Counting()
    fast = compiled(MODELS[1], backend=counting)
    for length, steps in ((1, 40), (5, 9), (30, 17), (2, 3)):
        prompts = [[1] * length, [2]]
        assert tokens_of(greedy(fast, prompts, steps)) == tokens_of(greedy(MODELS[1], prompts, steps))
        sample(fast, prompts, steps, seed=0)
    assert counting.graphs == 1
    greedy(fast, [[1], [2], [3]], 5)
    assert counting.graphs == 2  # another number of rows


def test_compiled_models_do_not_share_graphs():
    for model in MODELS:
        fast = compiled(model, backend="eager")
        tokens = draw_tokens(1, 6, 0)
        torch.testing.assert_close(
            read(fast, tokens, [2, 1, 1, 1, 1]), read(model, tokens, [6]), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("int8", [False, True])
def test_the_real_compiler_agrees(int8):
    model = random_transformer(layers=1, **SHAPES["gpt2"])
    model = quantize(model) if int8 else model
    tokens = draw_tokens(1, 9, 0)
    torch.testing.assert_close(
        read(compiled(model), tokens, [3, *[1] * 6]), read(model, tokens, [9]), atol=1e-4, rtol=1e-4
    )


def test_compiled_refuses_other_models():
    with pytest.raises(TypeError, match="compiled takes a Transformer, not a LSTM"):
        compiled(LSTM(LSTMConfig(VOCAB, width=8)))
    with pytest.raises(ValueError, match="window is 8"):
        compiled(random_transformer(window=8))
    with pytest.raises(ValueError, match="longest is 0"):
        compiled(MODELS[0], longest=0)
