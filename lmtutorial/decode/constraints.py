"""Constrained decoding: which tokens may come next, by any rule, or so that the text matches a pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmtutorial.decode.automaton import Automaton
from lmtutorial.vocabulary import Tokenizer

Allowed = Callable[[list[int]], Tensor]
"""Given the new tokens of a text so far, which tokens may follow: a bool tensor (vocab,). Where none may, the
text ends."""

NOTHING = -1
"""What stands in place of a token where a text has ended."""


class Matching:
    r"""An `Allowed`: only texts that can still become a full match of a regular expression are written.

    Pass it to `sample`, `greedy` or `stream` as `allowed`. A token may follow if the bytes of the text with
    it begin a match, be it in the middle of a character; `eos` (by default the tokenizer's, if it has one)
    may follow a full match; other special tokens never may. Where a full match cannot go on, and behind
    `eos`, nothing may follow: the text ends. The syntax is that of `lmtutorial.decode.automaton.Automaton`.

    A state of the automaton is compared with the vocabulary once, along the vocabulary's tree of common
    beginnings. Source: Willard and Louf, "Efficient guided generation for large language models", 2023.

    Raises ValueError for a pattern that it does not know, for one that matches no text, and, when called,
    where the text has a beginning of a match that no token of the vocabulary continues.

    >>> from lmtutorial.tokenizers import CharTokenizer
    >>> tokenizer = CharTokenizer("0123456789abc")
    >>> allowed = Matching("a+|[0-3]b", tokenizer)
    >>> tokenizer.decode(allowed([]).nonzero()[:, 0]), tokenizer.decode(allowed([2]).nonzero()[:, 0])
    ('0123a', 'b')
    """

    def __init__(self, pattern: str, tokenizer: Tokenizer, *, eos: int | None = None) -> None:
        self._automaton = Automaton(pattern)
        self._tokenizer, self._eos = tokenizer, tokenizer.eos if eos is None else eos
        if self._eos is not None and not 0 <= self._eos < tokenizer.vocab_size:
            raise ValueError(
                f"eos is {self._eos}; the ids of this tokenizer are 0 to {tokenizer.vocab_size - 1}"
            )
        special = {*tokenizer.specials.values(), self._eos}
        self._pieces = [
            b"" if token in special else tokenizer.decode_bytes([token])
            for token in range(tokenizer.vocab_size)
        ]
        self._tree = _prefix_tree(self._pieces)
        self._masks: dict[int, Tensor] = {}
        self._pattern = pattern

    def __call__(self, tokens: list[int]) -> Tensor:
        """The tokens that may follow, a bool tensor (vocab,); not to be written to, since it is kept."""
        if tokens and tokens[-1] == self._eos:
            return torch.zeros(len(self._pieces), dtype=torch.bool)
        text = b"".join([self._pieces[token] for token in tokens])
        state = self._automaton.read(0, text)
        if state is None:
            raise ValueError(f"the text {text!r} begins no match of the pattern {self._pattern!r}")
        if state not in self._masks:
            self._masks[state] = self._mask(state)
        if not self._masks[state].any() and not self._automaton.is_match(state):
            raise ValueError(
                f"no token of this vocabulary continues {text!r} to a match of the pattern {self._pattern!r}"
            )
        return self._masks[state]

    def _mask(self, state: int) -> Tensor:
        mask = torch.zeros(len(self._pieces), dtype=torch.bool)
        mask[self._followers(state)] = True
        if self._eos is not None:
            mask[self._eos] = self._automaton.is_match(state)
        return mask

    def _followers(self, state: int) -> list[int]:
        """The tokens that keep a match possible; only those branches of the tree are walked that do."""
        found: list[int] = []
        branches = [(self._tree, state)]
        while branches:
            node, at = branches.pop()
            steps = self._automaton.steps[at]
            for byte, child in node.items():
                if byte < 0:
                    found += child
                elif (after := steps[byte]) is not None:
                    branches.append((child, after))
        return found


def _prefix_tree(pieces: list[bytes]) -> dict[int, Any]:
    """Nodes by their next byte; under -1 the tokens that end at a node."""
    root: dict[int, Any] = {}
    for token, piece in enumerate(pieces):
        if piece:
            node = root
            for byte in piece:
                node = node.setdefault(byte, {})
            node.setdefault(-1, []).append(token)
    return root


class Rows:
    """The rows of a batch that an `Allowed` rules: their texts so far, and which of them have ended."""

    def __init__(self, allowed: Allowed, batch: int, ends: frozenset[int]) -> None:
        self._allowed, self._ends = allowed, ends
        self._texts: list[list[int]] = [[] for _ in range(batch)]
        self._open = [True] * batch

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits (batch, vocab) with -inf for what may not follow; rows that have ended stay as they are.

        Raises ValueError where the model gives all that may follow probability 0.
        """
        masks_BV = torch.ones(logits.shape, dtype=torch.bool)
        for row, text in enumerate(self._texts):
            if self._open[row]:
                mask_V = _checked(self._allowed(list(text)), logits.shape[1])
                self._open[row] = bool(mask_V.any())
                if self._open[row]:
                    masks_BV[row] = mask_V
        restricted_BV = logits.masked_fill(~masks_BV.to(logits.device), -math.inf)
        impossible_B = (restricted_BV.amax(-1) == -math.inf).tolist()
        for row in range(len(masks_BV)):
            if self._open[row] and impossible_B[row]:
                raise ValueError(
                    f"the model gives probability 0 to every token allowed after prompt {row} and the new "
                    f"tokens {self._texts[row]}"
                )
        return restricted_BV

    def read(self, tokens_B: Tensor) -> Tensor:
        """Go on with these tokens; gives them with `NOTHING` for rows that have ended."""
        for row, token in enumerate(tokens_B.tolist()):
            self._texts[row].append(token)
        ended_B = torch.tensor([not is_open for is_open in self._open], device=tokens_B.device)
        self._open = [
            is_open and text[-1] not in self._ends
            for is_open, text in zip(self._open, self._texts, strict=True)
        ]
        return tokens_B.masked_fill(ended_B, NOTHING)


def _checked(mask: object, vocab: int) -> Tensor:
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (vocab,)):
        shown = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)[:60]
        raise ValueError(f"allowed gave {shown}; it must give a bool tensor of shape ({vocab},)")
    return mask
