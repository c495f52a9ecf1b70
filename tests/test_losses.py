"""The loss is torch's cross-entropy in value and gradient, at half its memory, as a sum and a count."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lmtutorial import losses
from lmtutorial.losses import IGNORE, lm_loss


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99),
    st.sampled_from([1, 40, 2**22]),
)  # fmt: skip
def test_equals_torch_in_value_and_gradient_for_any_chunk(batch, time, vocab, ignored, seed, chunk):
    torch.manual_seed(seed)
    logits = (3 * torch.randn(batch, time, vocab)).requires_grad_()
    targets = torch.randint(vocab, (batch, time)).masked_fill(torch.rand(batch, time) < ignored, IGNORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK", chunk)
        nats, tokens = lm_loss(logits, targets)
        (grad,) = torch.autograd.grad(nats * 0.7, logits)
    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    (reference_grad,) = torch.autograd.grad(reference * 0.7, logits)
    assert tokens == (targets != IGNORE).sum()
    torch.testing.assert_close(nats, reference)
    torch.testing.assert_close(grad, reference_grad)


def test_gradient_agrees_with_finite_differences():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 4, IGNORE], [2, 2, 1]])
    (grad,) = torch.autograd.grad(lm_loss(logits, targets).nats, logits)
    step = 1e-2
    for _ in range(10):
        direction = torch.randn_like(logits)
        up, down = (lm_loss(logits + s * step * direction, targets).nats.detach() for s in (1, -1))
        torch.testing.assert_close(
            (up - down) / (2 * step), (grad * direction).sum().float(), rtol=1e-2, atol=1e-2
        )


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(8, 64, 100, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(100, (8, 64))
    nats = lm_loss(logits, targets).nats
    assert nats.dtype == torch.float32
    torch.testing.assert_close(
        nats, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    )
    nats.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_the_way_back_keeps_nothing_of_the_logits_size_but_the_logits():
    kept = []
    logits = torch.randn(4, 16, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lm_loss(logits * 1.0, torch.randint(100, (4, 16)))
    assert len({t.data_ptr() for t in kept if t.numel() == logits.numel()}) == 1


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3, 50\)"):
        lm_loss(torch.zeros(2, 3, 50), torch.zeros(2, 4, dtype=torch.int64))
