"""Decoders write the same text cached or not, in a batch or alone, at once or token by token."""

import pytest
import torch
from history_model import HistoryModel, Rereading
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logits import chi_squared
from torch.utils._python_dispatch import TorchDispatchMode

from lmtutorial.decode import sampling
from lmtutorial.decode.logits import to_probs
from lmtutorial.decode.sampling import greedy, sample, stream
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.mixture import Mixture
from lmtutorial.models.ngram import NGram
from lmtutorial.models.transformer import Transformer, TransformerConfig

VOCAB = 12
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def random_lstm(seed=0, device="cpu", **config):
    torch.manual_seed(seed)
    model = (
        LSTM(LSTMConfig(VOCAB, width=8, layers=2, **config)).to(device, torch.float64).eval()
    )  # no near-ties
    with torch.no_grad():
        model.head.weight.mul_(8)  # an untrained model is almost uniform: nothing that it reads would matter
    return model


def random_ngram(seed=0, **options):
    text = torch.randint(VOCAB, (400,), generator=torch.Generator().manual_seed(seed))
    return NGram.train(text, order=3, vocab_size=VOCAB, **options)


def random_transformer(seed=0, device="cpu", **config):
    torch.manual_seed(seed)
    shape = TransformerConfig(VOCAB, context=64, width=16, layers=2, heads=4, dropout=0.5, **config)
    model = Transformer(shape).to(device, torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


MODELS = {
    "history": HistoryModel(VOCAB),
    "history with ties": HistoryModel(VOCAB, ties=True),
    "n-gram": random_ngram(),
    "n-gram with zeros": random_ngram(smoothing="none"),
    "mixture": Mixture(random_lstm(), random_ngram(), torch.tensor([0.2, 0.5, 0.8])),
    "transformer": random_transformer(kv_heads=2, qk_norm=True),
    "gpt2": random_transformer(position="learned", norm="layer", mlp="gelu"),
    **{f"lstm on {device}": random_lstm(device=device, dropout=0.5) for device in DEVICES},
}
models = st.sampled_from(list(MODELS.values()))
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)

prompt = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
ragged = st.lists(prompt, min_size=1, max_size=5)
ends = st.none() | st.integers(0, VOCAB - 1) | st.sets(st.integers(0, VOCAB - 1), max_size=3)
options = st.fixed_dictionaries(
    {"eos": ends, "seed": st.integers(0, 10**20)},
    optional={
        "temperature": st.sampled_from([0, 0.3, 1, 1.7]),
        "top_k": st.integers(1, VOCAB),
        "top_p": st.floats(0, 1),
        "min_p": st.floats(0, 0.5),
        "typical_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 3),
    },
)
law = settings(max_examples=60)


def texts(generations):
    return [(generation.tokens, generation.finished) for generation in generations]


@law
@given(models, ragged, st.integers(0, 8), options)
def test_cached_equals_uncached(model, prompts, steps, options):
    cached = sample(model, prompts, steps, **options)
    uncached = sample(Rereading(model), prompts, steps, **options)
    assert texts(cached) == texts(uncached)
    assert [g.logprob for g in cached] == pytest.approx([g.logprob for g in uncached], abs=1e-4)


@law
@given(models, ragged, st.integers(1, 8))
def test_greedy_takes_the_most_likely_token_after_all_before_it(model, prompts, steps):
    for prompt, generation in zip(prompts, greedy(model, prompts, steps), strict=True):
        text = list(prompt)
        for _ in range(steps):
            text.append(int(model(torch.tensor([text], device=model.device))[0, -1].argmax()))
        assert generation.tokens == text[len(prompt) :]


@law
@given(models, ragged, options, st.data())
def test_a_text_does_not_depend_on_its_neighbors(model, prompts, options, data):
    distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    together = texts(sample(model, distinct, 6, **options))
    assert together == [texts(sample(model, [p], 6, **options))[0] for p in distinct]
    order = data.draw(st.permutations(range(len(distinct))))
    assert texts(sample(model, [distinct[i] for i in order], 6, **options)) == [together[i] for i in order]


@every_model
def test_copies_of_a_prompt_get_texts_of_their_own_and_more_copies_do_not_change_them(model):
    three = texts(sample(model, [[1, 2], [7], [1, 2], [1, 2]], 20, seed=3))
    assert len({str(three[i]) for i in (0, 2, 3)}) == 3
    assert [three[0], three[2]] == texts(sample(model, [[1, 2]] * 2, 20, seed=3))


@law
@given(models, prompt, st.integers(0, 8), options)
def test_a_stream_is_the_same_text_token_by_token(model, prompt, steps, options):
    assert (
        list(stream(model, prompt, steps, **options)) == sample(model, [prompt], steps, **options)[0].tokens
    )


@law
@given(models, ragged, st.integers(0, 9), st.integers(0, 9), options)
def test_a_larger_limit_only_goes_on(model, prompts, fewer, more, options):
    fewer, more = sorted([fewer, more])
    short, long = (sample(model, prompts, steps, **options) for steps in (fewer, more))
    assert [g.tokens for g in short] == [g.tokens[:fewer] for g in long]


@law
@given(models, ragged, st.integers(0, 9), ends)
def test_temperature_0_and_top_k_1_are_greedy(model, prompts, steps, eos):
    plain = greedy(model, prompts, steps, eos=eos)
    assert plain == sample(model, prompts, steps, temperature=0, top_p=0.5, eos=eos)
    assert plain == sample(model, prompts, steps, top_k=1, eos=eos)


@law
@given(models, ragged, st.integers(0, 8), options)
def test_logprob_is_what_one_uncached_forward_gives_the_new_tokens(model, prompts, steps, options):
    for prompt, (tokens, logprob, _) in zip(prompts, sample(model, prompts, steps, **options), strict=True):
        logits = model(torch.tensor([prompt + tokens], device=model.device))[0].detach().double().cpu()
        new = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens).long().view(-1, 1))
        assert logprob == pytest.approx(float(new.sum()), rel=1e-5, abs=1e-5)


@law
@given(models, ragged, options)
def test_a_text_is_finished_where_it_first_meets_an_end(model, prompts, options):
    eos = options.pop("eos")
    wanted = eos if isinstance(eos, set) else {eos}
    endless = sample(model, prompts, 12, **options)
    ended = sample(model, prompts, 12, eos=eos, **options)
    assert not any(g.finished for g in endless)
    for whole, cut in zip(endless, ended, strict=True):
        place = next((i for i, token in enumerate(whole.tokens) if token in wanted), None)
        assert cut.finished == (place is not None)
        assert cut.tokens == (whole.tokens if place is None else whole.tokens[: place + 1])


@pytest.mark.parametrize("patience", [1, 16])
@pytest.mark.parametrize("seed", range(5))
def test_the_loop_ends_soon_after_all_texts_have(monkeypatch, patience, seed):
    monkeypatch.setattr(sampling, "patience", lambda device: patience)
    model = HistoryModel(VOCAB, seed)
    generations = sample(model, [[1], [2, 3]], 1000, eos={4, 7}, seed=seed)
    longest = max(len(g.tokens) for g in generations)
    assert all(g.finished for g in generations)
    assert longest <= len(model.forwards) < longest + patience
    assert generations == sample(model, [[1], [2, 3]], longest, eos={4, 7}, seed=seed)


class CountWaits(TorchDispatchMode):
    """Counts the operations that bring a value from the device to Python, or need one to know their shape."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        blocking = (
            "item",
            "is_nonzero",
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "masked_select",
            "_unique2",
        )
        self.waits += func.overloadpacket.__name__.lstrip(".") in blocking
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.5},
    ],
)
def test_no_step_waits_for_the_device(monkeypatch, options):
    monkeypatch.setattr(sampling, "patience", lambda device: 16)

    model = HistoryModel(VOCAB, 1)
    model.table[:, 5] = -100  # never written

    def waits(steps, **more):
        with CountWaits() as count:
            sample(model, [[1], [2, 3]], steps, seed=0, **options, **more)
        return count.waits

    assert waits(64) == waits(2)
    assert waits(64, eos=5) == waits(2, eos=5) + 64 // 16  # one question in 16 steps: have all ended?


def test_sampled_texts_follow_the_models_joint_distribution():
    model = random_lstm(3)
    options = {"temperature": 0.9, "top_p": 0.95}
    first = to_probs(model(torch.tensor([[5, 1]]))[0, -1], **options)
    after = torch.stack([to_probs(model(torch.tensor([[5, 1, t]]))[0, -1], **options) for t in range(VOCAB)])
    joint = (first.unsqueeze(1) * after).flatten().detach()
    pairs = torch.tensor([g.tokens for g in sample(model, [[5, 1]] * 10_000, 2, seed=0, **options)])
    assert chi_squared((pairs @ torch.tensor([VOCAB, 1])).bincount(minlength=VOCAB**2), joint) > 1e-3


def test_a_seed_repeats_a_text_and_torchs_own_seed_rules_where_none_is_given():
    model = HistoryModel(VOCAB)
    assert sample(model, [[1]], 30, seed=1) == sample(model, [[1]], 30, seed=1)
    assert sample(model, [[1]], 30, seed=1) != sample(model, [[1]], 30, seed=2)
    torch.manual_seed(7)
    first, second = sample(model, [[1]], 30), sample(model, [[1]], 30)
    torch.manual_seed(7)
    assert first == sample(model, [[1]], 30)
    assert first != second


def test_prompts_that_differ_in_zeros_at_their_ends_draw_apart():
    class Uniform(HistoryModel):
        def __call__(self, tokens, cache=None):
            return super().__call__(tokens, cache) * 0

    one, other = sample(Uniform(), [[3], [3, 0]], 30, seed=0)
    assert one.tokens != other.tokens


@every_model
def test_a_huge_penalty_writes_every_token_once_before_any_again(model):
    class AllBelowZero(Rereading):
        def __call__(self, tokens, cache):
            return super().__call__(tokens, cache).log_softmax(-1).clamp(min=-50) - 1e-3

    for generation in sample(AllBelowZero(model), [[3], [5, 3]], 10, repetition_penalty=1e6, temperature=0):
        assert len(set(generation.tokens)) == 10
        assert 3 not in generation.tokens


def test_logits_that_are_nan_are_an_error_not_a_text():
    model = HistoryModel(VOCAB)
    model.table[:, 3] = torch.nan
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="the model's logits after prompt 0 and 0 new tokens are NaN"):
            sample(model, [[1], [2]], 5, temperature=temperature)
        with pytest.raises(ValueError, match="are NaN"):
            list(stream(model, [1], 5, temperature=temperature))
