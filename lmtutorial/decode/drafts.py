"""Drafts at work: what proposes the tokens that `speculative` checks, for all texts of a batch at once."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lmtutorial.decode.guesses import Guesser
from lmtutorial.decode.logits import Filters, draw
from lmtutorial.decode.prompts import decoding
from lmtutorial.models.cache import Cache, LanguageModel


class Proposal(NamedTuple):
    """The tokens that a draft proposes after each text, and the distributions that it drew them from."""

    tokens: Tensor
    """(batch, width) int64."""
    counts: Tensor
    """(batch,) int64: how many of a row's tokens are proposed; the rest only fills the row."""
    probs: Tensor | None
    """(batch, width, vocab); None where each token was certain."""


class Proposer(Protocol):
    """A draft at work on one batch."""

    def propose(self, text: Tensor, lengths: Tensor, noise: Tensor) -> Proposal:
        """What may follow the first `lengths` (batch,) tokens of `text` (batch, room).

        `noise` (batch, lookahead) is uniform in [0, 1): a number for each token that may be drawn.
        """

    def check(self) -> None:
        """Raises ValueError if any logits of the draft have been NaN."""


class ModelProposer:
    """A language model that drafts: it writes as the target would, with the same filters."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[list[int]],
        max_len: int,
        lookahead: int,
        filters: Filters,
    ) -> None:
        self.model, self.filters, self.max_len = model, filters, max_len
        self.cache = model.new_cache(len(prompts), max_len)
        check_slack(self.cache, lookahead)
        self.longest: int | None = max(map(len, prompts))  # until the prompts are read
        self.is_nan = torch.zeros((), dtype=torch.bool, device=model.device)
        self.rows_B1 = torch.arange(len(prompts), device=model.device)[:, None]
        self.last_two = torch.arange(2, device=model.device)

    def propose(self, text: Tensor, lengths: Tensor, noise: Tensor) -> Proposal:
        """Draw a token for each column of `noise`: one forward each, on the draft's device."""
        home, device = text.device, self.model.device
        text_BN, lengths_B, noise_BK = text.to(device), lengths.to(device), noise.to(device)
        tokens_BK = torch.zeros_like(noise_BK, dtype=torch.int64)
        probs = []
        with decoding(self.model):
            for i in range(noise.shape[1]):
                if i == 0:
                    logits_BV = self._read(text_BN, lengths_B)
                else:
                    # a row near its end may propose beyond the cache: that is dropped, but must not fail
                    self.cache.truncate((lengths_B + (i - 1)).clamp(max=self.max_len - 1))
                    logits_BV = self.model(tokens_BK[:, i - 1 : i], self.cache)[:, -1]
                self.is_nan |= logits_BV.amax().isnan()
                if self.filters.greedy:
                    tokens_BK[:, i] = self.filters.choose(logits_BV, None)
                else:
                    probs.append(self.filters.probs(logits_BV))
                    tokens_BK[:, i] = draw(probs[-1], noise_BK[:, i])
        counts_B = torch.full_like(lengths, noise.shape[1])
        return Proposal(tokens_BK.to(home), counts_B, torch.stack(probs, 1).to(home) if probs else None)

    def check(self) -> None:
        """Raises ValueError if any logits have been NaN: lossless as ever, but no draft."""
        if self.is_nan:
            raise ValueError("the logits of the draft are NaN")

    def _read(self, text_BN: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits after each text, having read the prompts at first, then what was accepted since.

        That is the one last token, or two where all were accepted: always the last two.
        """
        if self.longest is not None:
            logits_BTV = self.model(text_BN[:, : self.longest], self.cache)
            self.longest = None
            return logits_BTV[self.rows_B1[:, 0], lengths_B - 1]
        self.cache.truncate(lengths_B - 2)
        return self.model(text_BN[self.rows_B1, lengths_B[:, None] - 2 + self.last_two], self.cache)[:, -1]


def check_slack(cache: Cache, lookahead: int) -> None:
    """Raise ValueError for a cache that forgets, as that of a window, if it cannot take back a round."""
    slack = getattr(cache, "slack", None)
    if slack is not None and lookahead > slack + 1:
        raise ValueError(
            f"lookahead is {lookahead}; the cache of a model with a window cannot take back more than "
            f"{slack + 1} proposals"
        )


class GuessProposer:
    """A guesser, text by text, on the CPU: on another device each round waits for the accepted tokens."""

    def __init__(self, guesser: Guesser, batch: int) -> None:
        self.guessers = [guesser.new_text() for _ in range(batch)]
        self.texts: list[list[int]] = [[] for _ in range(batch)]

    def propose(self, text: Tensor, lengths: Tensor, noise: Tensor) -> Proposal:
        """As many columns as the longest guess has tokens, and none where there is no guess."""
        whole_BN, guesses = text.cpu().numpy(), []
        for row, length in enumerate(lengths.tolist()):
            known = self.texts[row]
            known.extend(whole_BN[row, len(known) : length].tolist())
            guesses.append(self.guessers[row].guess(known, noise.shape[1])[: noise.shape[1]])
        width = max(map(len, guesses))
        tokens_BK = torch.tensor([guess + [0] * (width - len(guess)) for guess in guesses], dtype=torch.int64)
        counts_B = torch.tensor([len(guess) for guess in guesses])
        return Proposal(tokens_BK.to(text.device), counts_B.to(text.device), None)

    def check(self) -> None:
        """Guesses come without logits."""
