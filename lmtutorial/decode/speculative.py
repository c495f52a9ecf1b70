"""Speculative decoding: a cheap draft proposes several tokens, the model checks them all in one forward.

The texts are the model's own, as if it had written them alone: at temperature 0 the same tokens, otherwise
tokens of the same distribution. Only the time differs.

Sources: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023;
Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from lmtutorial.decode.drafts import GuessProposer, ModelProposer, Proposal, Proposer, check_slack
from lmtutorial.decode.growing import Texts
from lmtutorial.decode.guesses import Guesser
from lmtutorial.decode.logits import Filters, draw
from lmtutorial.decode.noise import check_seed, row_noise
from lmtutorial.decode.prompts import Prompts, check_eos, check_prompts, decoding
from lmtutorial.decode.sampling import Generation
from lmtutorial.models.cache import LanguageModel


@dataclass
class Speculation:
    """How the proposals fared: what `speculative` fills in where it is given one.

    >>> from lmtutorial.models.ngram import NGram
    >>> model = NGram.train([0, 1, 2, 3] * 20, order=2, vocab_size=4)
    >>> report = Speculation()
    >>> _ = speculative(model, model, [[0]], 10, report=report)
    >>> report.proposed, report.accepted, report.calls, report.calls_saved, report.acceptance_rate
    ([[4, 4]], [[4, 4]], 2, 8, 1.0)
    """

    proposed: list[list[int]] = field(default_factory=list)
    """For each text, how many tokens were proposed in each round until it ended."""
    accepted: list[list[int]] = field(default_factory=list)
    """How many of them were accepted; each round also adds one token that the model chose itself."""
    calls: int = 0
    """Forwards of the model, all texts together in each."""
    calls_saved: int = 0
    """How many more forwards the same texts take without a draft: one for each token of the longest."""

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens / proposed tokens, over all texts; NaN where nothing was proposed."""
        proposed = sum(map(sum, self.proposed))
        return sum(map(sum, self.accepted)) / proposed if proposed else float("nan")


def speculative(
    model: LanguageModel,
    draft: LanguageModel | Guesser,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    lookahead: int = 4,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    eos: int | Collection[int] | None = None,
    seed: int | None = None,
    report: Speculation | None = None,
) -> list[Generation]:
    """What `greedy` writes, or at a temperature above 0 what `sample` could write, in fewer forwards.

    `draft` is a language model of the same vocabulary, or a `Guesser` such as `PromptLookup`. In each round
    it proposes up to `lookahead` tokens after each text, `model` reads them in one forward, and each text
    keeps those before the first refused one, and one more: what the model chooses in its place.

    A proposal x is accepted with probability min(1, p(x) / q(x)), where p and q are the distributions of the
    model and of the draft, both filtered; in place of a refused one comes a token from max(0, p - q),
    normalized. Together that is a token from p, whatever q is. Greedy decoding is the case of two point
    masses; a guess is the case of one.

    A text depends on its own prompt only, as in `sample`, but uses its noise in another way: at the same seed
    the texts of the two differ. What `sample` says of errors, modes and gradients holds here too.

    Raises also ValueError for vocabularies of different sizes, a lookahead below 1, or beyond what a model
    with a window can take back, a prompt that with `max_new_tokens` does not fit the draft's context, and
    logits of the draft that are NaN.

    >>> from lmtutorial.models.ngram import NGram
    >>> from lmtutorial.decode.guesses import PromptLookup
    >>> model = NGram.train([0, 1, 2, 3] * 20, order=2, vocab_size=4)
    >>> [text] = speculative(model, PromptLookup(), [[0, 1, 2, 3, 0]], 5)
    >>> text.tokens
    [1, 2, 3, 0, 1]
    """
    filters = Filters(temperature, top_k, top_p, min_p, typical_p)
    ids = check_prompts(model, prompts, max_new_tokens)
    ends = check_eos(model, eos)
    seed = check_seed(seed)
    _check_draft(model, draft, ids, max_new_tokens, lookahead)
    if not ids or not max_new_tokens:
        _fill(report, [Generation([], 0.0, False) for _ in ids], [])
        return [Generation([], 0.0, False) for _ in ids]
    lookahead = min(lookahead, max_new_tokens - 1)
    proposer: Proposer
    with decoding(model):
        texts = Texts(model, ids, max_new_tokens, lookahead, ends)
        check_slack(texts.cache, lookahead)
        if isinstance(draft, Guesser):
            proposer = GuessProposer(draft, len(ids))
        else:
            proposer = ModelProposer(draft, ids, texts.max_len, lookahead, filters)
        noise_BN3 = _noise(filters, ids, max_new_tokens + lookahead + 1, seed).to(model.device)
        rounds: list[_Round] = []
        patience = _patience(model.device)
        while len(rounds) % patience or not texts.ended.all():
            rounds.append(_round(model, proposer, texts, filters, lookahead, noise_BN3))
        proposer.check()
        generations = texts.generations()
    _fill(report, generations, rounds)
    return generations


class _Round(NamedTuple):
    """How many tokens were proposed and accepted, (batch,) each; -1 for a text that had ended before."""

    proposed: Tensor
    accepted: Tensor


def _round(
    model: LanguageModel,
    proposer: Proposer,
    texts: Texts,
    filters: Filters,
    lookahead: int,
    noise_BN3: Tensor,
) -> _Round:
    """Propose, read, verify: each text grows by one token or more."""
    noise_BT3 = noise_BN3[texts.rows_B1, texts.span(texts.lengths - texts.begins, lookahead + 1)]
    tokens_BK, counts_B, probs_BKV = proposer.propose(texts.tokens, texts.lengths, noise_BT3[:, :-1, 0])
    proposal = Proposal(tokens_BK, texts.clip(counts_B), probs_BKV)
    logits_BTV = texts.read(model, tokens_BK)
    accepted_B, chosen_B = _verify(filters, logits_BTV, proposal, noise_BT3[..., 1:])
    had_ended_B = texts.ended
    kept_B = texts.extend(accepted_B, chosen_B, logits_BTV)
    # where a text ends amid what was accepted, nothing after its end counts
    proposed_B = torch.where(kept_B > accepted_B, proposal.counts, kept_B).masked_fill_(had_ended_B, -1)
    return _Round(proposed_B, accepted_B.minimum(kept_B).masked_fill_(had_ended_B, -1))


def verify(probs: Tensor, proposal: Proposal, noise: Tensor) -> tuple[Tensor, Tensor]:
    """How many proposals of each row are accepted, and the token that comes after them; (batch,) each.

    `probs` (batch, width + 1, vocab) are the target's, at each proposed token and after the last. `noise`
    (batch, width + 1 or more, 2) decides whether a proposal is accepted, and draws the token after. Where all
    were accepted that is one from the target's own distribution: there the draft has proposed nothing, q = 0.

    >>> half, proposed = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]), torch.tensor([[0]])
    >>> verify(half, Proposal(proposed, torch.tensor([1]), None), torch.tensor([[[0.6, 0.0], [0.0, 0.0]]]))
    (tensor([0]), tensor([1]))
    """
    tokens_BK, counts_B, q_BKV = proposal
    width = tokens_BK.shape[1]
    p_BK = probs[:, :width].gather(2, tokens_BK.unsqueeze(-1)).squeeze(-1)
    q_BK = 1.0 if q_BKV is None else q_BKV.gather(2, tokens_BK.unsqueeze(-1)).squeeze(-1)
    accepted_B = _leading(noise[:, :width, 0] * q_BK < p_BK, counts_B)

    rows = torch.arange(len(probs), device=probs.device)
    p_BV, refused_B = probs[rows, accepted_B], accepted_B.clamp(max=width - 1)
    was_refused_B1 = (accepted_B < counts_B)[:, None]
    if width == 0:
        rest_BV = p_BV
    elif q_BKV is None:
        rest_BV = p_BV.scatter_add(1, tokens_BK[rows, refused_B][:, None], -was_refused_B1.to(p_BV.dtype))
    else:
        rest_BV = p_BV - q_BKV[rows, refused_B] * was_refused_B1
    rest_BV = rest_BV.clamp(min=0)
    # nothing can be left only by rounding, where p and q are equal but for their last digits
    rest_BV = torch.where(rest_BV.sum(1, keepdim=True) > 0, rest_BV, p_BV)
    return accepted_B, draw(rest_BV, noise[rows, accepted_B, 1])


def _verify(
    filters: Filters, logits_BTV: Tensor, proposal: Proposal, noise_BT2: Tensor
) -> tuple[Tensor, Tensor]:
    """`verify(filters.probs(logits), ...)`, without forming point masses where they are some."""
    if not filters.greedy:
        return verify(filters.probs(logits_BTV), proposal, noise_BT2)
    best_BT = filters.choose(logits_BTV, None)
    accepted_B = _leading(best_BT[:, :-1] == proposal.tokens, proposal.counts)
    return accepted_B, best_BT.gather(1, accepted_B[:, None])[:, 0]


def _leading(is_good_BK: Tensor, counts_B: Tensor) -> Tensor:
    """How many of the first `counts` columns are good, up to the first that is not; (batch,)."""
    places = torch.arange(is_good_BK.shape[1], device=counts_B.device)
    return (is_good_BK & (places < counts_B[:, None])).cumprod(1).sum(1)


def _patience(device: torch.device) -> int:
    """Rounds between two questions whether all texts have ended: on a GPU each waits for it to catch up."""
    return 1 if device.type == "cpu" else 4


def _noise(filters: Filters, ids: list[list[int]], steps: int, seed: int | None) -> Tensor:
    """Three uniform numbers for each place of each text, (batch, steps, 3): to propose, to accept, to choose.

    They belong to the place, not to the round, so that a text draws the same whatever its neighbors do. Still
    no number is used twice: what was proposed beyond a refused token has decided nothing that was kept.
    """
    if filters.greedy:
        return torch.zeros(len(ids), steps, 3)
    return row_noise(ids, 3 * steps, seed).T.reshape(len(ids), steps, 3)


def _fill(report: Speculation | None, generations: list[Generation], rounds: list[_Round]) -> None:
    if report is None:
        return
    report.proposed, report.accepted = [], []
    for column, lists in enumerate((report.proposed, report.accepted)):
        table_BR = torch.stack([numbers[column] for numbers in rounds], 1).tolist() if rounds else []
        lists.extend([number for number in row if number >= 0] for row in table_BR or [[]] * len(generations))
    report.calls = len(rounds)
    report.calls_saved = max((len(g.tokens) for g in generations), default=0) - len(rounds)


def _check_draft(
    model: LanguageModel,
    draft: LanguageModel | Guesser,
    ids: list[list[int]],
    max_new_tokens: int,
    lookahead: int,
) -> None:
    if not (isinstance(draft, Guesser) or hasattr(draft, "new_cache")):
        raise TypeError(f"draft is {draft!r}; it must be a language model or a Guesser")
    if not isinstance(lookahead, Integral):
        raise TypeError(f"lookahead is {lookahead!r}; it must be an integer of at least 1")
    if lookahead < 1:
        raise ValueError(f"lookahead is {lookahead}; it must be at least 1")
    if draft.vocab_size is not None and draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"the draft has a vocabulary of {draft.vocab_size:,} tokens, the model one of "
            f"{model.vocab_size:,}; a draft must propose the model's own tokens"
        )
    context = None if isinstance(draft, Guesser) else draft.context
    for row, prompt in enumerate(ids):
        total = len(prompt) + max_new_tokens
        if context is not None and total > context:
            raise ValueError(
                f"prompt {row} has {len(prompt):,} tokens; with max_new_tokens={max_new_tokens} that is "
                f"{total:,}, over the draft's context of {context:,}"
            )
