"""Native steps: the logits of the model itself, whatever is read, in float32 and int8."""

import functools
import platform
import shutil
from pathlib import Path

import pytest
import torch
from cache_laws import check_going_back
from hypothesis import given, settings
from hypothesis import strategies as st
from random_transformers import (
    MODELS,
    SHAPES,
    VOCAB,
    draw_tokens,
    models,
    pieces,
    random_transformer,
    read,
    seeds,
    tokens_of,
)

from lmtutorial import native as module
from lmtutorial.decode.sampling import greedy
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.native import native
from lmtutorial.quantize import quantize


@settings(max_examples=200)
@given(models, st.integers(1, 6), pieces, seeds)
def test_native_steps_give_the_models_logits(model, rows, pieces, seed):
    tokens = draw_tokens(rows, sum(pieces), seed)
    torch.testing.assert_close(
        read(native(model), tokens, pieces), read(model, tokens, pieces), atol=1e-4, rtol=1e-4
    )


@settings(max_examples=100)
@given(models, st.integers(1, 6), pieces, seeds)
def test_native_int8_steps_give_the_logits_of_the_weights_that_the_integers_stand_for(
    model, rows, pieces, seed
):
    small, tokens = quantize(model), draw_tokens(rows, sum(pieces), seed)
    fast, plain = read(native(small), tokens, pieces), read(small, tokens, pieces)
    torch.testing.assert_close(fast, plain, atol=2e-3, rtol=0)


@settings(max_examples=100)
@given(models, st.lists(st.integers(0, 6), min_size=1, max_size=4), seeds)
def test_native_rows_go_back_and_are_reordered(model, keep, seed):
    check_going_back(native(model), keep, seed)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("int8", [False, True])
def test_threads_change_no_bit(threads, int8):
    before = torch.get_num_threads()
    model = native(quantize(MODELS[1]) if int8 else MODELS[1])
    tokens = draw_tokens(3, 9, 0)
    torch.set_num_threads(1)
    alone = read(model, tokens, [4, 1, 4])
    torch.set_num_threads(threads)
    assert read(model, tokens, [4, 1, 4]).equal(alone)
    torch.set_num_threads(before)


def test_native_is_for_prompts_of_any_length_and_beside_others():
    model = MODELS[1]
    prompts = [[1] * 20, [2, 3], [4, 5, 6] * 5]
    for longest in (1, 7, 1000):
        assert tokens_of(greedy(native(model, longest), prompts, 20)) == tokens_of(greedy(model, prompts, 20))


def test_native_refuses_what_it_does_not_compute():
    with pytest.raises(TypeError, match="native takes a Transformer, not a LSTM"):
        native(LSTM(LSTMConfig(VOCAB, width=8)))
    with pytest.raises(ValueError, match=r"embedding.weight is torch.float64 on cpu"):
        native(random_transformer().double())
    with pytest.raises(ValueError, match="group=4"):
        native(quantize(MODELS[0], group=4))
    with pytest.raises(ValueError, match="window is 8"):
        native(random_transformer(window=8))
    with pytest.raises(ValueError, match="longest is 0"):
        native(MODELS[0], longest=0)


def test_native_errors_are_the_models_own_and_leave_the_cache_as_it_was():
    fast = native(MODELS[0])
    with torch.no_grad():
        cache = fast.new_cache(1, 2)
        fast(torch.tensor([[1]]), cache)
        with pytest.raises(IndexError):
            fast(torch.tensor([[VOCAB]]), cache)
        assert cache.lengths.tolist() == [1]
        fast(torch.tensor([[1]]), cache)
        with pytest.raises(ValueError, match="at most 2 tokens a row, 3 are needed"):
            fast(torch.tensor([[1]]), cache)


@pytest.mark.parametrize("model", MODELS, ids=list(SHAPES))
@pytest.mark.parametrize(("rows", "cached"), [(1, 2), (2, 1), (2, 3), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_does_not_fit_the_native_step_is_what_the_model_makes_of_it(model, rows, cached, dtype):
    def outcome(reader):
        cache = model.new_cache(cached, 4)
        with torch.no_grad():
            try:
                return reader(torch.ones(rows, 2, dtype=dtype), cache), cache.lengths
            except (RuntimeError, IndexError) as error:
                return type(error), cache.lengths

    fast, plain = outcome(native(model)), outcome(model)
    if isinstance(plain[0], type):
        assert fast[0] is plain[0]
    else:
        torch.testing.assert_close(fast[0], plain[0])
    assert fast[1].equal(plain[1])


@pytest.mark.parametrize("int8", [False, True])
def test_logits_after_nan_are_nan(int8):
    model = random_transformer(tied=False)
    fast = native(quantize(model) if int8 else model)
    fast.model.embedding.weight[3] = torch.nan
    with pytest.raises(ValueError, match="are NaN"):
        greedy(fast, [[3], [1]], 4)
    assert greedy(fast, [[1]], 1)[0].logprob < 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_processors_with_shorter_vectors_compute_the_same(processor, monkeypatch, tmp_path):
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in module.FLAGS]
    path = tmp_path / "native.so"
    module._compile([shutil.which("g++"), *flags, *module.SHARED, str(module.SOURCE)], path)
    if processor.removeprefix("x86-64") not in levels():
        return  # it compiles, and cannot run here
    monkeypatch.setattr(module, "_library", functools.cache(lambda: module._load(path)))
    for model in (*MODELS, quantize(MODELS[1]), quantize(MODELS[4])):
        for rows in (1, 5, 17):
            tokens = draw_tokens(rows, 9, 0)
            atol = 1e-4 if model in MODELS else 2e-3
            fast, plain = read(native(model, 1000), tokens, [4, 1, 4]), read(model, tokens, [9])
            torch.testing.assert_close(fast, plain, atol=atol, rtol=0)


def levels():
    """Which levels of x86-64 this processor has, by a sign of each."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ["", *(["-v3"] if " avx2 " in flags else []), *(["-v4"] if " avx512bw " in flags else [])]


def test_a_missing_compiler_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="install g"):
        module._library.__wrapped__()
