"""Beam search: the likeliest texts that can be found with a few of them in hand at each step.

All prompts and beams take one forward a step. What the search finds, and when it stops, is that of Hugging
Face's `generate(num_beams=width)`, text for text and score for score.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from lmtutorial.decode.candidates import best_continuations
from lmtutorial.decode.prompts import Prompts, check_eos, check_prompts, decoding, prefill
from lmtutorial.decode.sampling import Generation, patience
from lmtutorial.models.cache import LanguageModel

EarlyStopping = bool | Literal["never"]


def beam_search(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    width: int = 4,
    length_penalty: float = 1.0,
    eos: int | Collection[int] | None = None,
    n_best: int = 1,
    early_stopping: EarlyStopping = False,
) -> list[list[Generation]]:
    """The `n_best` texts of the highest score found after each of the prompts, best first.

    At each step every one of the `width` beams of a prompt is continued by every token, and the likeliest
    `width` of the texts without an end go on. Texts that met an `eos` token (an id or a collection of ids),
    while among the likeliest `width`, or the limit of `max_new_tokens`, are kept by their `score`: the
    log-probability divided by length**length_penalty. Width 1 is greedy, but for "never", which may look on;
    a width of all texts is exhaustive.

    A prompt is done when `width` texts are kept and, with `early_stopping`

    - False: the best beam, if it ended now, would score no better than the worst of them;
    - "never": nor would it at its best length, were all tokens to come certain: no text of a beam is missed;
    - True: at once.

    There are fewer than `n_best` texts only where fewer exist. Where several tie, any of them may come first.
    Nothing is computed for gradients, and dropout is off.

    Raises ValueError or TypeError, before the model runs, for what `sample` refuses and options out of range;
    ValueError where the model gives logits that are NaN.

    Sources: Lowerre, "The Harpy speech recognition system", 1976; the length penalty as a power: Wu et al.,
    "Google's neural machine translation system", 2016, section 7, there of (5 + length) / 6.

    >>> from lmtutorial.models.ngram import NGram
    >>> model = NGram.train([0, 1, 0, 1, 0, 2, 2, 2, 2, 2, 2], order=2, vocab_size=3, smoothing="none")
    >>> [[one, two]] = beam_search(model, [[0]], 3, n_best=2)
    >>> one.tokens, two.tokens
    ([1, 0, 1], [2, 2, 2])
    """
    search = _Search(width, length_penalty, n_best, early_stopping)
    ids = check_prompts(model, prompts, max_new_tokens)
    search.check_lengths(max_new_tokens)
    ends = check_eos(model, eos)
    if not ids or not max_new_tokens:
        return [[Generation([], 0.0, False)] for _ in ids]
    with decoding(model):
        tree, kept = search.run(model, ids, max_new_tokens, ends)
    return tree.generations(kept, n_best, ends)


def score(generation: Generation, length_penalty: float = 1.0) -> float:
    """What `beam_search` ranks by: log-probability / length**length_penalty, in nats; 0 for no tokens.

    The length counts the new tokens, the end-of-text token included. With a penalty of 1 this is the mean
    per token; above 0 long texts gain.

    >>> score(Generation([5, 7], logprob=-3.0, finished=False))
    -1.5
    """
    return generation.logprob / float(max(len(generation.tokens), 1) ** length_penalty)


@dataclass
class _Ranked:
    """Some nodes of each prompt's tree, (batch, number), by falling score; -inf where there is no text."""

    scores: Tensor
    nodes: Tensor


class _Tree:
    """Every candidate that was among the best of its step: a token, added to one of the step before.

    Candidate `rank` of `step` is node step * candidates + rank of its prompt.
    """

    def __init__(self, batch: int, steps: int, candidates: int, device: torch.device) -> None:
        self.candidates = candidates
        shape = (batch, steps * candidates)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.parents = torch.full(shape, -1, device=device)
        self.logprobs = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, step: int, logprobs_BK: Tensor, parents_BK: Tensor, tokens_BK: Tensor) -> Tensor:
        """The nodes of these candidates, (candidates,); the log-probability is that of the whole text."""
        start, count = step * self.candidates, tokens_BK.shape[1]
        here = slice(start, start + count)
        self.tokens[:, here], self.parents[:, here], self.logprobs[:, here] = (
            tokens_BK,
            parents_BK,
            logprobs_BK,
        )
        return torch.arange(start, start + count, device=tokens_BK.device)

    def generations(self, kept: _Ranked, n_best: int, ends: frozenset[int]) -> list[list[Generation]]:
        """The texts of the first `n_best` nodes of each prompt; ValueError if anything was NaN."""
        tokens, parents, logprobs = (t.cpu().numpy() for t in (self.tokens, self.parents, self.logprobs))
        if (nan := self.logprobs.isnan().nonzero()).numel():
            row, node = nan[nan[:, 1].argmin()].tolist()
            raise ValueError(
                f"the model's logits after prompt {row} and {node // self.candidates} new tokens are NaN"
            )
        batches = []
        found = zip(kept.nodes[:, :n_best].tolist(), kept.scores[:, :n_best].tolist(), strict=True)
        for row, (nodes, scores) in enumerate(found):
            best = []
            for node in (node for node, score in zip(nodes, scores, strict=True) if score > -math.inf):
                text, at = [], node
                while at >= 0:
                    text.append(int(tokens[row, at]))
                    at = int(parents[row, at])
                best.append(Generation(text[::-1], float(logprobs[row, node]), text[0] in ends))
            batches.append(best)
        return batches


@dataclass(frozen=True)
class _Search:
    """The options of `beam_search`, checked."""

    width: int
    length_penalty: float
    n_best: int
    early_stopping: EarlyStopping

    def __post_init__(self) -> None:
        for name, most in (("width", math.inf), ("n_best", self.width)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be an integer of at least 1")
            if not 1 <= int(value) <= most:
                limit = "at least 1" if most == math.inf else f"from 1 to width, which is {most}"
                raise ValueError(f"{name} is {value}; it must be {limit}")
        if not isinstance(self.length_penalty, Real) or isinstance(self.length_penalty, bool):
            raise TypeError(f"length_penalty is {self.length_penalty!r}; it must be a number")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it must be False, True or 'never'")

    def check_lengths(self, longest: int) -> None:
        """Raise ValueError where no float can hold `longest` to the power of the penalty."""
        power = math.log(max(longest, 1)) * self.length_penalty
        if not abs(power) < 700:
            raise ValueError(
                f"length_penalty is {self.length_penalty}; with max_new_tokens={longest} it must be a number "
                "for which max_new_tokens**length_penalty is neither 0 nor infinite"
            )

    def run(
        self, model: LanguageModel, ids: list[list[int]], steps: int, ends: frozenset[int]
    ) -> tuple[_Tree, _Ranked]:
        """All candidates, and the finished texts among them."""
        batch, width, device = len(ids), self.width, model.device
        is_end_V = torch.zeros(model.vocab_size, dtype=torch.bool, device=device)
        is_end_V[list(ends)] = True
        most = (1 + len(ends)) * width  # if all ends of all beams come first, enough to go on with are left
        tree = _Tree(batch, steps, most, device)
        kept, beams = _ranked(batch, width, -math.inf, device), _ranked(batch, 1, 0.0, device)
        open_B = torch.ones(batch, dtype=torch.bool, device=device)
        prompts_B1 = torch.arange(batch, device=device)[:, None]
        logits_RV, cache = prefill(model, ids, steps)
        for step in range(steps):
            last = step == steps - 1
            logprobs_RV = logits_RV.log_softmax(-1, dtype=torch.promote_types(logits_RV.dtype, torch.float32))
            logprobs_BWV = logprobs_RV.view(batch, -1, model.vocab_size)
            scores_BK, from_BK, tokens_BK = best_continuations(logprobs_BWV, beams.scores, most)
            nodes_K = tree.add(step, scores_BK, beams.nodes.gather(1, from_BK), tokens_BK)
            if ends or last:
                ended_BK = is_end_V[tokens_BK] | last
                new_BW = torch.where(ended_BK & open_B[:, None], scores_BK, -math.inf)[:, :width]
                kept = _merged(kept, new_BW / (step + 1) ** self.length_penalty, nodes_K[:width])
                scores_BK = scores_BK.masked_fill(ended_BK, -math.inf)
            if last:
                break
            scores_BW, picks_BW = scores_BK.topk(min(width, scores_BK.shape[1]))
            if ends:
                open_B = open_B & self._hopeful(scores_BW[:, 0], kept.scores[:, -1], step + 1, steps)
                if (step + 1) % patience(device) == 0 and not open_B.any():
                    break
            rows_BW = prompts_B1 * beams.scores.shape[1] + from_BK.gather(1, picks_BW)
            cache.reorder(rows_BW.flatten())
            beams = _Ranked(scores_BW, nodes_K[picks_BW])
            logits_RV = model(tokens_BK.gather(1, picks_BW).view(-1, 1), cache)[:, -1]
        return tree, kept

    def _hopeful(self, best_B: Tensor, worst_B: Tensor, length: int, longest: int) -> Tensor:
        """Whether the best beam of a prompt may still come to beat the worst text kept; -inf: too few are."""
        if self.early_stopping is True:
            return worst_B.isinf() & ~best_B.isinf()
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = longest
        return best_B / float(length**self.length_penalty) > worst_B


def _ranked(batch: int, count: int, score: float, device: torch.device) -> _Ranked:
    scores = torch.full((batch, count), score, dtype=torch.float64, device=device)
    return _Ranked(scores, torch.full((batch, count), -1, device=device))


def _merged(kept: _Ranked, scores_BN: Tensor, nodes_N: Tensor) -> _Ranked:
    """The best of both, as many as are kept."""
    scores = torch.cat([kept.scores, scores_BN], dim=1)
    nodes = torch.cat([kept.nodes, nodes_N.expand_as(scores_BN)], dim=1)
    scores, picks = scores.topk(kept.scores.shape[1])
    return _Ranked(scores, nodes.gather(1, picks))
