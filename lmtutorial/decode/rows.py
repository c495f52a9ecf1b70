"""Drawing the next tokens of a batch in which every row may ask for something else."""

from __future__ import annotations

import torch
from torch import Tensor

from lmtutorial.decode.logits import PASSES, Filters, Pass, argmax, draw, keep_top_k, penalize, precise
from lmtutorial.decode.noise import text_generator

Rows = Tensor | slice


class RowSampler:
    """The filters, the noise and the used tokens of each row; rows come and go.

    A row gets the tokens that `sample` would draw for its prompt alone, whatever is in the other rows. Each
    filter is one pass over the rows that use it, each with its own value, so that a step costs no more where
    every row asks for something else.

    >>> sampler = RowSampler(rows=2, vocab_size=3, max_len=9, device=torch.device("cpu"))
    >>> sampler.take(0, prompt=[1], steps=8, filters=Filters(temperature=0))
    >>> sampler.take(1, prompt=[1], steps=8, filters=Filters(top_k=2), seed=1)
    >>> sampler.choose(torch.tensor([[1.0, 2.0, 3.0]]).expand(2, 3), lengths_R=torch.tensor([1, 1]))
    tensor([2, 2])
    """

    def __init__(self, rows: int, vocab_size: int, max_len: int, device: torch.device) -> None:
        """For texts of at most `max_len` tokens, prompts included; all memory is set aside here."""
        self._filters: list[Filters | None] = [None] * rows
        self._stale = True
        self._passes: list[tuple[Pass, Rows, Tensor]] = []
        self._seen_RV = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self._noise_RS = torch.zeros(rows, max_len + 1, dtype=torch.float64, device=device)  # by place

    def take(
        self, row: int, prompt: list[int], steps: int, filters: Filters, seed: int = 0, copy: int = 0
    ) -> None:
        """Give a row to a text of `steps` tokens after `prompt`; `seed` and `copy` as in `text_generator`."""
        self._filters[row], self._stale = filters, True
        self._seen_RV[row] = False
        self._seen_RV[row, prompt] = True
        if not filters.greedy:
            noise_N = torch.from_numpy(text_generator(prompt, seed, copy).random(steps))
            self._noise_RS[row, len(prompt) : len(prompt) + steps] = noise_N

    def free(self, row: int) -> None:
        """The row's text has ended."""
        self._filters[row], self._stale = None, True

    def choose(self, logits_RV: Tensor, lengths_R: Tensor) -> Tensor:
        """The next token of every row, (rows,), given how many tokens it has now; of free rows, any."""
        if self._stale:
            self._plan()
        logits_RV = precise(logits_RV).clone()
        if self._penalized is not None:
            rows, penalty = self._penalized
            logits_RV[rows] = penalize(logits_RV[rows], self._seen_RV[rows], penalty.to(logits_RV))
        tokens_R = torch.zeros_like(lengths_R)
        if self._greedy is not None:
            tokens_R[self._greedy] = argmax(logits_RV[self._greedy])
        if self._drawn is not None:
            for keep, rows, values in self._passes:
                logits_RV[rows] = keep(logits_RV[rows], values)
            noise_R = self._noise_RS.gather(1, lengths_R.unsqueeze(1)).squeeze(1)[self._drawn]
            tokens_R[self._drawn] = draw(logits_RV[self._drawn].softmax(-1), noise_R)
        self._seen_RV.scatter_(1, tokens_R.unsqueeze(1), True)
        return tokens_R

    def _plan(self) -> None:
        """Which rows each filter is for, and with which values, (rows, 1) each, in the order of `Filters`."""
        drawn = [(row, f) for row, f in enumerate(self._filters) if f and not f.greedy]
        self._greedy = self._rows([row for row, f in enumerate(self._filters) if f and f.greedy])
        self._drawn = self._rows([row for row, _ in drawn])
        taken = [(row, f.repetition_penalty) for row, f in enumerate(self._filters) if f]
        self._penalized = self._values([(row, p) for row, p in taken if p != 1])
        self._passes = []
        for keep in PASSES:
            values = [(row, f.passes[keep]) for row, f in drawn if keep in f.passes]
            if (found := self._values(values, whole=keep is keep_top_k)) is not None:
                self._passes.append((keep, *found))
        self._stale = False

    def _values(self, values: list[tuple[int, float]], whole: bool = False) -> tuple[Rows, Tensor] | None:
        rows = self._rows([row for row, _ in values])
        if rows is None:
            return None
        seen_RV = self._seen_RV
        if not whole:
            return rows, torch.tensor([[v] for _, v in values], dtype=torch.float64, device=seen_RV.device)
        # no more than there are: a huge number may be asked for, and would not fit an int64
        return rows, torch.tensor([[min(int(v), seen_RV.shape[1])] for _, v in values], device=seen_RV.device)

    def _rows(self, rows: list[int]) -> Rows | None:
        """An index for `rows`; None if there are none."""
        if len(rows) == len(self._filters):
            return slice(None)  # nothing to pick out
        return torch.tensor(rows, device=self._seen_RV.device) if rows else None
