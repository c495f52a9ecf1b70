"""Prompts are checked before the model runs, and the model is left as it was found."""

import pytest
import torch
from history_model import HistoryModel

from lmtutorial.decode.sampling import Generation, greedy, sample, stream
from lmtutorial.models.lstm import LSTM, LSTMConfig

VOCAB = 12


def random_lstm(**config):
    torch.manual_seed(0)
    return LSTM(LSTMConfig(VOCAB, width=8, layers=2, **config)).eval()


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[1], []], {}, ValueError, "prompt 1 is empty; .* give it the id of the end of text"),
        ([[1], [2, 12]], {}, ValueError, "prompt 1 holds token 12 at position 1; the ids .* are 0 to 11"),
        ([[-1]], {}, ValueError, "prompt 0 holds token -1 at position 0"),
        ([[1, 2.0]], {}, TypeError, "prompt 0 holds 2.0; token ids are integers"),
        (["hello"], {}, TypeError, "prompt 0 is 'hello'; .* encode text with the tokenizer"),
        ([1, 2], {}, TypeError, r"prompt 0 is 1; .* write \[\[1, 2\]\] for the one prompt"),
        ("hello", {}, TypeError, "prompts is 'hello'"),
        (None, {}, TypeError, "prompts is None"),
        (
            [[1], [0] * 1100],
            {},
            ValueError,
            "prompt 1 has 1,100 tokens; with max_new_tokens=200 that is 1,300, over ",
        ),
        ([[1]], {"max_new_tokens": -1}, ValueError, "max_new_tokens is -1; it must be at least 0"),
        ([[1]], {"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5"),
        ([[1]], {"eos": 12}, ValueError, "eos is 12; the ids of this model are 0 to 11"),
        ([[1]], {"eos": [3, -1]}, ValueError, "eos is -1"),
        ([[1]], {"eos": "</s>"}, TypeError, "eos is '</s>'"),
        ([[1]], {"eos": [None]}, TypeError, "eos holds None"),
        ([[1]], {"seed": -1}, ValueError, "seed is -1; it must be at least 0"),
        ([[1]], {"seed": 1.5}, TypeError, "seed is 1.5"),
        ([[1]], {"temperature": -1}, ValueError, "temperature is -1"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(prompts, options, error, message):
    model = HistoryModel(VOCAB, context=1024)
    arguments = {"max_new_tokens": 200, **options}
    with pytest.raises(error, match=message):
        sample(model, prompts, **arguments)
    if isinstance(prompts, list) and len(prompts) == 1:
        with pytest.raises(error, match=message):
            stream(model, prompts[0], **arguments)  # at the call, not at the first token
    assert model.forwards == []


def test_a_prompt_may_fill_the_context_to_the_last_token():
    model = HistoryModel(VOCAB, context=10)
    assert len(greedy(model, [[1] * 7, [2]], 3)[0].tokens) == 3


def test_nothing_asked_for_is_nothing_done():
    model = HistoryModel(VOCAB)
    assert greedy(model, [], 5) == sample(model, [], 5) == []
    assert sample(model, [[1], [2]], 0) == [Generation([], 0.0, False)] * 2
    assert list(stream(model, [1], 0)) == []
    assert model.forwards == []


def test_a_model_in_training_mode_is_read_without_dropout_and_left_as_it_was():
    model = random_lstm(dropout=0.5)
    expected = sample(model, [[1], [2, 3]], 20, seed=0)
    model.train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    assert sample(model, [[1], [2, 3]], 20, seed=0) == expected
    assert [module.training for module in model.modules()] == modes
    tokens = []
    for token in stream(model, [1], 20, seed=0):
        tokens.append(token)
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert tokens == expected[0].tokens


def test_a_model_that_fails_is_left_in_the_mode_it_was():
    model = random_lstm().train()
    model.lstm.forward = None
    model.head.forward = None
    with pytest.raises(TypeError):
        sample(model, [[1]], 5)
    assert all(module.training for module in model.modules())


def test_nothing_is_recorded_for_gradients():
    class Watched(HistoryModel):
        def __call__(self, tokens, cache=None):
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled()
            return super().__call__(tokens, cache)

    assert len(greedy(Watched(), [[1]], 3)[0].tokens) == len(list(stream(Watched(), [1], 3))) == 3


def test_training_goes_on_after_sampling():
    model = random_lstm().train()
    sample(model, [[1]], 3)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.embedding.weight.grad is not None


def test_tensors_and_arrays_are_prompts_too():
    model = HistoryModel(VOCAB)
    expected = greedy(model, [[1, 2], [3, 4]], 5)
    assert greedy(model, torch.tensor([[1, 2], [3, 4]]), 5) == expected
    assert greedy(model, [torch.tensor([1, 2]).numpy(), range(3, 5)], 5) == expected
