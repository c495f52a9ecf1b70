"""The optimizers to read equal torch's and the textbook's, and every parameter has one that moves it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmtutorial.optim import SGD, Adam, AdamW, Muon, orthogonalize
from lmtutorial.optimizer_groups import MuonAdamW, build_optimizer, parameter_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_every_parameter_is_in_one_group_and_only_matrices_outside_embeddings_decay():
    model = Tied()
    decayed, rest = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.inner.weight)]
    everything = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model, 1e-3)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(2, 3)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_updates_equal_adam_written_out(weight_decay):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    rate, beta1, beta2 = 0.05, 0.8, 0.95
    optimizer = build_optimizer(layer, rate, weight_decay=weight_decay, betas=(beta1, beta2))
    for t in range(1, 6):
        optimizer.zero_grad()
        (layer(torch.randn(4, 5, dtype=torch.double)) ** 2).sum().backward()
        for name, p in layer.named_parameters():
            first[name] = beta1 * first[name] + (1 - beta1) * p.grad
            second[name] = beta2 * second[name] + (1 - beta2) * p.grad**2
            step = (first[name] / (1 - beta1**t)) / ((second[name] / (1 - beta2**t)).sqrt() + 1e-8)
            shrink = 1 - rate * (weight_decay if name == "weight" else 0.0)
            expected[name] = expected[name] * shrink - rate * step
        optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate .* got -1\.0"),
        ({"learning_rate": math.nan}, r"learning_rate .* got nan"),
        ({"weight_decay": -0.1}, r"weight_decay .* got -0\.1"),
        ({"betas": (0.9, 1.0)}, r"betas .* got \(0\.9, 1\.0\)"),
    ],
)
def test_bad_settings_are_refused_with_the_value(options, message):
    options = {"learning_rate": 1e-3, **options}
    with pytest.raises(ValueError, match=message):
        build_optimizer(nn.Linear(2, 2), options.pop("learning_rate"), **options)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Identity has no parameter to train"):
        build_optimizer(nn.Identity(), 1e-3)


def trained(make, steps, seed):
    """A small network's weights after some steps of the optimizer that `make` builds."""
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)]
    model = nn.Sequential(*layers).double()
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(4, 5, dtype=torch.double)) ** 2).sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


settings_of = st.fixed_dictionaries(
    {"lr": st.floats(1e-4, 0.1), "steps": st.integers(1, 8), "seed": st.integers(0, 99)}
)
# with beta2 near 0 a step is the sign of the gradient, and the last digit of one near 0 decides it
betas = st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.999))
law = settings(deadline=None, max_examples=40)


@law
@given(settings_of, st.floats(0, 0.99))
def test_sgd_equals_torchs(options, momentum):
    lr, steps, seed = options["lr"], options["steps"], options["seed"]
    ours = trained(lambda p: SGD(p, lr, momentum), steps, seed)
    torch.testing.assert_close(ours, trained(lambda p: torch.optim.SGD(p, lr, momentum), steps, seed))


@law
@given(settings_of, betas)
def test_adam_equals_torchs(options, betas):
    lr, steps, seed = options["lr"], options["steps"], options["seed"]
    ours = trained(lambda p: Adam(p, lr, betas), steps, seed)
    torch.testing.assert_close(ours, trained(lambda p: torch.optim.Adam(p, lr, betas), steps, seed))


@law
@given(settings_of, betas, st.floats(0, 1))
def test_adamw_equals_torchs(options, betas, decay):
    lr, steps, seed = options["lr"], options["steps"], options["seed"]
    ours = trained(lambda p: AdamW(p, lr, betas, weight_decay=decay), steps, seed)
    wanted = trained(lambda p: torch.optim.AdamW(p, lr, betas, weight_decay=decay), steps, seed)
    torch.testing.assert_close(ours, wanted)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon to equal")
@law
@given(settings_of, st.floats(0, 0.99), st.floats(0, 1))
def test_muon_equals_torchs_within_the_rounding_of_bfloat16(options, momentum, decay):
    lr, seed = options["lr"], options["seed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmtutorial.optim.bfloat16_pays", lambda *_: True)  # as torch's does anywhere
        ours = trained(lambda p: Muon(p, lr, momentum, decay), 1, seed)
    wanted = trained(
        lambda p: torch.optim.Muon(
            p, lr, decay, momentum, adjust_lr_fn="match_rms_adamw"
        ),
        1,
        seed,
    )  # fmt: skip
    start = trained(lambda p: SGD(p, 0.0), 1, seed)
    torch.testing.assert_close((ours - start) / lr, (wanted - start) / lr, atol=0.02, rtol=0.02)


@law
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_orthogonalize_keeps_the_singular_vectors_and_makes_the_values_alike(many, rows, columns, seed, pays):
    torch.manual_seed(seed)
    matrices = torch.randn(many, rows, columns)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmtutorial.optim.bfloat16_pays", lambda *_: pays)
        found = orthogonalize(matrices)
    assert found.dtype == (torch.bfloat16 if pays else torch.float32)
    inside = u.mT @ found.float() @ vt.mT
    large = s > 0.05 * s.norm(dim=-1, keepdim=True)  # what is much smaller has not grown to 1 in five steps
    values = inside.diagonal(dim1=-2, dim2=-1)[large]
    assert ((values > 0.6) & (values < 1.3)).all()


def test_muon_moves_the_matrices_and_adamw_the_rest():
    model = Tied()
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.1)
    model.head(model.norm(model.inner(model.embedding(torch.tensor([1, 2]))))).square().sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.inner.weight]) == {"momentum_buffer"}
    assert {"exp_avg", "exp_avg_sq"} < set(optimizer.state[model.embedding.weight])
    assert len(optimizer.state) == len(list(model.parameters()))


def test_an_untied_head_is_adamws_and_decays():
    model = Tied()
    model.head = nn.Linear(4, 7, bias=False)
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.1)
    found = [([tuple(p.shape) for p in g["params"]], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [([(4, 4)], 0.1), ([(7, 4)], 0.1), ([(7, 4), (4,), (4,), (4,)], 0.0)]
    model.head(model.inner(model.embedding(torch.arange(7)))).square().sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.inner.weight]) == {"momentum_buffer"}
    assert {"exp_avg", "exp_avg_sq"} < set(optimizer.state[model.head.weight])
    again = MuonAdamW(model, lr=0.01, weight_decay=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert set(again.state[model.head.weight]) == set(optimizer.state[model.head.weight])


def test_muon_and_adamw_go_on_from_a_saved_state_and_obey_a_rate_set_from_outside():
    def step(model, optimizer, rate):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model.head(model.inner(model.embedding(torch.arange(7)))).square().sum().backward()
        optimizer.step()

    one = Tied()
    first = MuonAdamW(one, lr=0.5)
    step(one, first, 0.01)
    two = copy.deepcopy(one)
    second = MuonAdamW(two, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (two, second)):
        step(model, optimizer, 0.02)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    before = [p.detach().clone() for p in one.parameters()]
    step(one, first, 0.0)
    assert all(torch.equal(p, b) for p, b in zip(one.parameters(), before, strict=True))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"a parameter has shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="LayerNorm has no matrix inside"):
        build_optimizer(nn.LayerNorm(3), 0.1, kind="muon")
    with pytest.raises(ValueError, match="'sgd'; it must be one of adamw, muon"):
        build_optimizer(nn.Linear(3, 2), 0.1, kind="sgd")
