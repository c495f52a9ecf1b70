"""Texts that grow by several tokens at once, each row by its own number: the state of `speculative`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmtutorial.decode.sampling import Generation
from lmtutorial.models.cache import LanguageModel


class Texts:
    """The texts of a batch as they grow, on the model's device: padded on the right, with their lengths."""

    def __init__(
        self,
        model: LanguageModel,
        ids: list[list[int]],
        max_new_tokens: int,
        lookahead: int,
        ends: frozenset[int],
    ) -> None:
        device, longest = model.device, max(map(len, ids))
        self.max_len = longest + max_new_tokens
        self.cache = model.new_cache(len(ids), self.max_len)
        self.unread = longest  # tokens of the prompts; they are read with the first proposals
        tokens_BN = torch.zeros(len(ids), self.max_len + lookahead + 1, dtype=torch.int64)
        tokens_BN[:, :longest] = pad_sequence([torch.tensor(prompt) for prompt in ids], batch_first=True)
        self.tokens = tokens_BN.to(device)
        self.logprobs = torch.zeros_like(self.tokens, dtype=torch.float64)
        self.begins = torch.tensor([len(prompt) for prompt in ids], device=device)
        self.lengths, self.limits = self.begins, self.begins + max_new_tokens
        self.ended = torch.zeros_like(self.begins, dtype=torch.bool)
        self.rows_B1 = torch.arange(len(ids), device=device)[:, None]
        self._steps = torch.arange(self.tokens.shape[1], device=device)
        self._ends, is_end_V = ends, torch.zeros(model.vocab_size, dtype=torch.bool)
        is_end_V[list(ends)] = True
        self._is_end_V = is_end_V.to(device)

    def span(self, start_B: Tensor, width: int) -> Tensor:
        """The `width` places from `start` on, (batch, width)."""
        return start_B[:, None] + self._steps[:width]

    def clip(self, counts_B: Tensor) -> Tensor:
        """No more proposals than leave room for the token that the model chooses after them."""
        return counts_B.minimum(self.limits - self.lengths - 1).clamp_(min=0)

    def read(self, model: LanguageModel, proposed_BK: Tensor) -> Tensor:
        """Logits after each text and after each of its proposals, (batch, width + 1, vocab).

        Where the padding of a row's proposals would go beyond the cache, which may be as long as the model's
        context, the row starts as much earlier and reads its last tokens once more.
        """
        width = proposed_BK.shape[1]
        self.tokens.scatter_(1, self.span(self.lengths, width), proposed_BK)
        last_B, time = self.lengths - 1, width + 1
        start_B = last_B.clamp(max=self.max_len - time)
        if self.unread:
            start_B, time, self.unread = torch.zeros_like(last_B), self.unread + width, 0
        self.cache.truncate(start_B)
        logits_BTV = model(self.tokens[self.rows_B1, self.span(start_B, time)], self.cache)
        return logits_BTV[self.rows_B1, self.span(last_B - start_B, width + 1).clamp_(max=time - 1)]

    def extend(self, accepted_B: Tensor, chosen_B: Tensor, logits_BTV: Tensor) -> Tensor:
        """Keep the accepted proposals and the token chosen after them; how many were kept, (batch,).

        That is fewer where a text ends before, and none where it had ended.
        """
        self.tokens[self.rows_B1[:, 0], self.lengths + accepted_B] = chosen_B
        places_BT = self.span(self.lengths, logits_BTV.shape[1])
        tokens_BT = self.tokens.gather(1, places_BT)
        precise = torch.promote_types(logits_BTV.dtype, torch.float32)
        logprobs_BTV = logits_BTV.log_softmax(-1, dtype=precise)
        logprobs_BT = logprobs_BTV.gather(2, tokens_BT.unsqueeze(-1)).squeeze(-1)
        self.logprobs.scatter_(1, places_BT, logprobs_BT.double())
        ends_BT = self._is_end_V[tokens_BT] & (self._steps[: tokens_BT.shape[1]] <= accepted_B[:, None])
        has_end_B, first_end_B = ends_BT.max(1)
        kept_B = torch.where(has_end_B, first_end_B, accepted_B).add_(1).masked_fill_(self.ended, 0)
        self.lengths = self.lengths + kept_B
        self.ended = self.ended | has_end_B | (self.lengths == self.limits)
        return kept_B

    def generations(self) -> list[Generation]:
        """The new tokens of each text. Raises ValueError where the logits of one of them are NaN."""
        generations = []
        spans = zip(self.begins.tolist(), self.lengths.tolist(), strict=True)
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        for row, (begin, end) in enumerate(spans):
            new, nats = tokens[row][begin:end], logprobs[row][begin:end]
            done = next((i for i, logprob in enumerate(nats) if math.isnan(logprob)), None)
            if done is not None:
                raise ValueError(f"the model's logits after prompt {row} and {done} new tokens are NaN")
            generations.append(Generation(new, sum(nats), new[-1] in self._ends))
        return generations
