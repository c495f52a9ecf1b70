"""Beam search finds what Hugging Face's finds, and with full width what counting all texts finds."""

import functools
import itertools
import math
import random

import pytest
import torch
import transformers
from history_model import HistoryModel, Rereading
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hugging_face import random_model, theirs
from test_sampling import MODELS, VOCAB, CountWaits, ends, models, ragged
from test_sampling import random_transformer as random_transformer_of_12

from lmtutorial.decode import beam, candidates
from lmtutorial.decode.beam import beam_search, score
from lmtutorial.decode.candidates import best_continuations
from lmtutorial.decode.sampling import Generation, greedy
from lmtutorial.hugging_face import to_hf
from lmtutorial.models.ngram import NGram
from lmtutorial.models.transformer import Transformer, TransformerConfig

transformers.utils.logging.set_verbosity_error()
TIE_FREE = [model for name, model in MODELS.items() if "ties" not in name and "n-gram" not in name]
options = st.fixed_dictionaries(
    {"eos": ends, "width": st.integers(1, 5)},
    optional={
        "length_penalty": st.sampled_from([-1.0, 0.0, 0.7, 1.0, 2.0]),
        "early_stopping": st.sampled_from([False, True, "never"]),
    },
)
law = settings(max_examples=60)


def check(found, wanted):
    """The same texts, in the same order, of the same log-probability up to float32's rounding."""
    for one, other in zip(found, wanted, strict=True):
        assert [(g.tokens, g.finished) for g in one] == [(g.tokens, g.finished) for g in other]
        assert [g.logprob for g in one] == pytest.approx([g.logprob for g in other], rel=1e-5, abs=1e-5)


def set_of(eos):
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


# Hugging Face


def random_search(rng, vocab):
    """Options that both sides have. Width 1 is no beam search there."""
    width = rng.randint(2, 6)
    return {
        "width": width,
        "length_penalty": rng.choice([1.0, 1.0, 0.0, 0.6, 2.0, -1.0]),
        "n_best": rng.randint(1, width),
        "eos": rng.sample(range(vocab), rng.choice([0, 1, 1, 2, 3])),
        "early_stopping": rng.choice([False, True, "never"]),
    }


@torch.no_grad()
def their_beam_search(reference, prompts, steps, *, width, length_penalty, n_best, eos, early_stopping):
    """The new tokens up to an end, and the score, of each text."""
    reference.generation_config.eos_token_id = None  # or GPT-2's own would be taken
    out = reference.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        max_new_tokens=steps,
        num_beams=width,
        num_return_sequences=n_best,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=eos or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = []
    for text, its_score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        new = text[len(prompts[0]) :]
        end = next((i + 1 for i, token in enumerate(new) if token in eos), len(new))
        texts.append((new[:end], pytest.approx(its_score, rel=1e-4, abs=1e-4)))
    return [texts[i : i + n_best] for i in range(0, len(texts), n_best)]


@pytest.mark.parametrize("seed", range(100))
def test_texts_and_scores_are_those_of_hugging_face(monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(candidates, "MANY", rng.choice([0, candidates.MANY]))
    vocab = rng.choice([rng.randint(12, 60), rng.randint(61, 200)])
    heads = rng.choice([1, 2])
    kind = rng.choice(["gpt2", "llama"])
    config = (
        TransformerConfig.gpt2(vocab, context=24, width=4 * heads, layers=1, heads=heads)
        if kind == "gpt2"
        else TransformerConfig(vocab, context=24, width=4 * heads, layers=1, heads=heads, tied=False)
    )
    model = random_model(config, seed)
    search, steps, length = random_search(rng, vocab), rng.randint(1, 12), rng.randint(1, 6)
    prompts = [[rng.randrange(vocab) for _ in range(length)] for _ in range(3)]
    found = beam_search(model, prompts, steps, **search)
    wanted = their_beam_search(theirs(*to_hf(model)), prompts, steps, **search)
    assert [[(g.tokens, score(g, search["length_penalty"])) for g in batch] for batch in found] == wanted
    assert all(g.finished == (g.tokens[-1] in search["eos"]) for batch in found for g in batch)


# The plain way: one text after the other, in lists


def next_logprobs(model, text):
    with torch.no_grad():
        return model(torch.tensor([text], device=model.device))[0, -1].double().log_softmax(-1).tolist()


def plain_beam_search(model, prompt, steps, *, width, eos, length_penalty=1.0, early_stopping=False):
    kept, beams = [], [(0.0, [])]
    for length in range(1, steps + 1):
        candidates = [
            (logprob + more, [*text, token])
            for logprob, text in beams
            for token, more in enumerate(next_logprobs(model, prompt + text))
            if logprob + more > -math.inf
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        ended = [c for c in candidates[:width] if c[1][-1] in eos or length == steps]
        kept += [(logprob / length**length_penalty, logprob, text) for logprob, text in ended]
        kept = sorted(kept, key=lambda text: -text[0])[:width]
        beams = [c for c in candidates if c[1][-1] not in eos][:width]
        reach = steps if early_stopping == "never" and length_penalty > 0 else length
        if not beams or (
            len(kept) == width
            and (early_stopping is True or beams[0][0] / reach**length_penalty <= kept[-1][0])
        ):
            break
    return [Generation(text, logprob, text[-1] in eos) for _, logprob, text in kept]


@law
@given(st.sampled_from(TIE_FREE), ragged, st.integers(1, 6), options)
def test_all_rows_at_once_find_what_plain_lists_find(model, prompts, steps, search):
    found = beam_search(model, prompts, steps, n_best=search["width"], **search)
    plain = {**search, "eos": set_of(search["eos"])}
    check(found, [plain_beam_search(model, prompt, steps, **plain) for prompt in prompts])


@pytest.mark.parametrize("seed", range(300))
def test_tiny_vocabularies_leave_beams_without_a_text_and_they_are_never_found(seed):
    rng = random.Random(seed)
    vocab = rng.randint(1, 5)
    model = HistoryModel(vocab, seed)
    if seed % 3 == 0:
        model.table[torch.rand(model.table.shape) < 0.3] = -math.inf
        model.table[:, 0] = 0
    search = {
        "width": rng.randint(1, 9),
        "eos": set(rng.sample(range(vocab), rng.randint(0, vocab))),
        "length_penalty": rng.choice([0.0, 1.0, -0.5]),
        "early_stopping": rng.choice([False, True, "never"]),
    }
    prompt, steps = [rng.randrange(vocab)], rng.randint(1, 5)
    found = beam_search(model, [prompt], steps, n_best=search["width"], **search)
    wanted = plain_beam_search(model, prompt, steps, **search)
    check(found, [wanted])


# Other laws


def tiny_models(vocab, seed):
    torch.manual_seed(seed)
    shape = TransformerConfig(vocab, context=16, width=8, layers=1, heads=2)
    text = torch.randint(vocab, (60,))
    transformer = random_model(shape, seed).double()
    return [HistoryModel(vocab, seed), transformer, NGram.train(text, order=3, vocab_size=vocab)]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("seed", range(20))
def test_full_width_is_exhaustive_search(seed, early_stopping):
    rng = random.Random(seed)
    vocab, steps, penalty = rng.randint(2, 4), rng.randint(1, 3), rng.choice([0.0, 1.0, 1.5, -1.0])
    eos = set(rng.sample(range(vocab), rng.randint(0, 2)))
    for model in tiny_models(vocab, seed):
        texts = []
        for text in itertools.product(range(vocab), repeat=steps):
            end = next((i + 1 for i, token in enumerate(text) if token in eos), steps)
            if not any(set(text[end:])):  # each shorter text once: with nothing but zeros behind its end
                steps_of = [next_logprobs(model, [0, *text[:i]])[text[i]] for i in range(end)]
                texts.append(Generation(list(text[:end]), sum(steps_of), text[end - 1] in eos))
        texts.sort(key=lambda g: -score(g, penalty))
        width = vocab**steps
        [found] = beam_search(
            model, [[0]], steps, width=width, n_best=width, eos=eos,
            length_penalty=penalty, early_stopping=early_stopping,
        )  # fmt: skip
        if isinstance(model, NGram):  # whose texts may tie
            assert sorted(g.tokens for g in found) == sorted(g.tokens for g in texts)
            key = functools.partial(score, length_penalty=penalty)
            assert list(map(key, found)) == pytest.approx(list(map(key, texts)), rel=1e-5)
        else:
            check([found], [texts])


@law
@given(models, ragged, st.integers(0, 8), ends, st.booleans())
def test_width_1_takes_a_likeliest_token_at_each_step(model, prompts, steps, eos, early):
    found = [g for [g] in beam_search(model, prompts, steps, width=1, eos=eos, early_stopping=early)]
    for prompt, g in zip(prompts, found, strict=True):
        for i, token in enumerate(g.tokens):
            logprobs = next_logprobs(model, prompt + g.tokens[:i])
            assert logprobs[token] == pytest.approx(max(logprobs))
        assert [token in set_of(eos) for token in g.tokens[:-1]] == [False] * (len(g.tokens) - 1) or not steps
        assert g.finished or len(g.tokens) == steps


@law
@given(st.sampled_from(TIE_FREE), ragged, st.integers(0, 8), ends)
def test_width_1_is_greedy(model, prompts, steps, eos):
    found = beam_search(model, prompts, steps, width=1, eos=eos)
    check(found, [[g] for g in greedy(model, prompts, steps, eos=eos)])


@law
@given(models, ragged, st.integers(0, 8), options)
def test_a_batch_finds_what_each_prompt_finds_alone(model, prompts, steps, search):
    search["n_best"] = search["width"]
    together = beam_search(model, prompts, steps, **search)
    alone = [beam_search(model, [prompt], steps, **search)[0] for prompt in prompts]
    assert [[g.logprob for g in batch] for batch in together] == [
        pytest.approx([g.logprob for g in batch], abs=1e-6) for batch in alone
    ]
    if model in TIE_FREE:
        check(together, alone)


@law
@given(st.sampled_from(TIE_FREE), ragged, st.integers(0, 8), options)
def test_cached_equals_uncached(model, prompts, steps, search):
    uncached = beam_search(Rereading(model), prompts, steps, **search)
    check(beam_search(model, prompts, steps, **search), uncached)


@law
@given(models, ragged, st.integers(1, 8), options)
def test_logprob_is_that_of_the_tokens_and_the_best_come_first(model, prompts, steps, search):
    found = beam_search(model, prompts, steps, n_best=search["width"], **search)
    for prompt, batch in zip(prompts, found, strict=True):
        for tokens, logprob, finished in batch:
            each = [next_logprobs(model, prompt + tokens[:i])[tokens[i]] for i in range(len(tokens))]
            assert logprob == pytest.approx(sum(each), rel=1e-5, abs=1e-5)
            assert finished == (tokens[-1] in set_of(search["eos"]))
        scores = [score(g, search.get("length_penalty", 1.0)) for g in batch]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(g.tokens) for g in batch}) == len(batch)


@law
@given(models, ragged, st.integers(0, 8), options)
def test_n_best_are_the_first_of_all_that_are_kept(model, prompts, steps, search):
    everything = beam_search(model, prompts, steps, n_best=search["width"], **search)
    for n in range(1, search["width"] + 1):
        assert beam_search(model, prompts, steps, n_best=n, **search) == [texts[:n] for texts in everything]


@pytest.mark.parametrize("many", [0, 10_000])
@pytest.mark.parametrize("seed", range(100))
def test_the_best_continuations_are_the_largest_of_all_block_by_block_or_at_once(monkeypatch, many, seed):
    monkeypatch.setattr(candidates, "MANY", many)
    draw = torch.Generator().manual_seed(seed)
    batch, beams, vocab, k = (int(torch.randint(1, n, (), generator=draw)) for n in (4, 5, 300, 20))
    logprobs = torch.randn(batch, beams, vocab, generator=draw)
    logprobs[torch.rand(logprobs.shape, generator=draw) < 0.3] = -math.inf
    scores = torch.randn(batch, beams, generator=draw, dtype=torch.float64) * 5
    sums, rows, tokens = best_continuations(logprobs, scores, k)
    everything = (logprobs + scores[..., None]).flatten(1)
    assert sums.equal(everything.topk(min(k, beams * vocab)).values)
    assert ((rows >= 0) & (rows < beams) & (tokens >= 0) & (tokens < vocab)).all()
    found = sums > -math.inf
    places = rows * vocab + tokens
    assert sums[found].equal(everything.gather(1, places)[found])
    for row in range(batch):
        assert len(set(places[row][found[row]].tolist())) == found[row].sum()


# What it costs, and what it refuses


def test_a_prompt_is_read_once_and_all_beams_take_one_forward_a_step():
    model = HistoryModel(VOCAB)
    beam_search(model, [[1, 2, 3], [4], [5, 6]], 5, width=4)
    assert model.forwards == [(3, 3)] + [(12, 1)] * 4


@pytest.mark.parametrize("every", [1, 16])
def test_the_search_ends_soon_after_all_prompts_are_done(monkeypatch, every):
    monkeypatch.setattr(beam, "patience", lambda device: every)
    model = HistoryModel(VOCAB)
    found = beam_search(model, [[1], [2, 3]], 1000, eos={4, 7}, n_best=4)
    assert len(model.forwards) < 100
    check(found, [plain_beam_search(model, p, 1000, width=4, eos={4, 7}) for p in ([1], [2, 3])])


def test_no_step_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(beam, "patience", lambda device: 16)
    model = HistoryModel(VOCAB, 1)
    model.table[:, 5] = -100  # never written

    def waits(steps, **more):
        with CountWaits() as count:
            beam_search(model, [[1], [2, 3]], steps, **more)
        return count.waits

    assert waits(64) == waits(2)
    assert waits(64, eos=5) == waits(2, eos=5) + 63 // 16


def test_a_model_in_training_is_read_without_dropout_and_trains_on():
    model = random_transformer_of_12(position="learned", norm="layer", mlp="gelu")
    wanted = beam_search(model, [[1, 2]], 6)
    model.train()
    assert beam_search(model, [[1, 2]], 6) == wanted
    assert all(module.training for module in model.modules())


def test_half_precision_scores_in_float32():
    config = TransformerConfig.gpt2(50, context=16, width=8, layers=1, heads=2)
    model = Transformer(config).to(torch.bfloat16).eval()
    [[g]] = beam_search(model, [[1]], 3)
    each = [next_logprobs(model, [1, *g.tokens[:i]])[g.tokens[i]] for i in range(3)]
    assert g.logprob == pytest.approx(sum(each), abs=0.05)
    assert g.logprob != torch.tensor(g.logprob).bfloat16().item()


@pytest.mark.parametrize("steps", [0, 3])
def test_no_prompts_and_no_tokens_are_no_work(steps):
    model = HistoryModel(VOCAB)
    assert beam_search(model, [], steps) == []
    assert beam_search(model, [[1], [2]], 0, n_best=3) == [[Generation([], 0.0, False)]] * 2
    assert model.forwards == []


@pytest.mark.parametrize("done", range(3))
def test_logits_that_are_nan_are_an_error_not_a_text(done):
    model = HistoryModel(VOCAB)
    calls = itertools.count()
    compute = model.__class__.__call__

    class Breaking(HistoryModel):
        def __call__(self, tokens, cache=None):
            logits = compute(self, tokens, cache)
            if next(calls) == done:
                logits[-1, -1, 3] = torch.nan
            return logits

    with pytest.raises(ValueError, match=f"the model's logits after prompt 1 and {done} new tokens are NaN"):
        beam_search(Breaking(VOCAB), [[1], [2]], 5, eos=7)


@pytest.mark.parametrize(
    ("error", "message", "bad"),
    [
        (ValueError, "width is 0; it must be at least 1", {"width": 0}),
        (TypeError, "width is 2.0; it must be an integer of at least 1", {"width": 2.0}),
        (TypeError, "width is True; it must be an integer", {"width": True}),
        (ValueError, "n_best is 5; it must be from 1 to width, which is 4", {"n_best": 5}),
        (ValueError, "n_best is 0; it must be from 1 to width, which is 4", {"n_best": 0}),
        (TypeError, "n_best is None; it must be an integer", {"n_best": None}),
        (TypeError, "length_penalty is '1'; it must be a number", {"length_penalty": "1"}),
        (ValueError, "length_penalty is nan; with max_new_tokens=9", {"length_penalty": math.nan}),
        (ValueError, "length_penalty is 1000.0; with max_new_tokens=9", {"length_penalty": 1000.0}),
        (ValueError, "early_stopping is 'all'; it must be False, True or 'never'", {"early_stopping": "all"}),
        (ValueError, "eos is 12; the ids of this model are 0 to 11", {"eos": 12}),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_the_model_runs(error, message, bad):
    model = HistoryModel(VOCAB)
    with pytest.raises(error, match=message):
        beam_search(model, [[1]], 9, **bad)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        beam_search(model, [[]], 9)
    assert model.forwards == []
