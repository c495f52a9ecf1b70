"""What texts that begin alike share: the state of models after blocks of tokens, kept for the next text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from lmtutorial.models.cache import Cache, LanguageModel


class PrefixCache:
    """Copies of cache rows, cut into blocks of `block` tokens, found by the text up to each block's end.

    Holds at most `tokens` tokens, and forgets the blocks that nobody asked for the longest. Texts that begin
    alike share their first blocks: a tree of prefixes, in one dictionary. A token costs what it costs in the
    model's cache, in a Transformer 2 * layers * kv_heads * head_size numbers; none is kept with `tokens=0`.
    Sources: Kwon et al., "Efficient memory management for large language model serving with PagedAttention",
    SOSP 2023; Zheng et al., "SGLang: Efficient execution of structured language model programs", 2024.

    >>> from lmtutorial.models.ngram import NGram
    >>> model, prefixes = NGram.train([0, 1, 2] * 9, order=2, vocab_size=3), PrefixCache(tokens=100, block=2)
    >>> cache = model.new_cache(1, 5)
    >>> _ = model(torch.tensor([[0, 1, 2, 0, 1]]), cache)
    >>> _ = prefixes.keep(cache, row=0, text=[0, 1, 2, 0, 1])
    >>> len(prefixes.find([0, 1, 2, 0, 2])), len(prefixes.find([0, 1, 1, 0])), len(prefixes.find([1, 2]))
    (2, 1, 0)
    """

    def __init__(self, tokens: int, block: int = 16) -> None:
        for name, value, least in (("tokens", tokens, 0), ("block", block, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.block, self._room = block, tokens // block
        self._blocks: OrderedDict[tuple[int, ...], Any] = OrderedDict()  # the last used come last

    @property
    def tokens(self) -> int:
        """How many tokens it holds now."""
        return len(self._blocks) * self.block

    def keys(self, text: Sequence[int]) -> list[tuple[int, ...]]:
        """The names of the whole blocks of `text`: the text up to the end of each."""
        ends = range(self.block, len(text) + 1, self.block) if self._room else ()
        return [tuple(text[:end]) for end in ends]

    def find(self, text: Sequence[int]) -> list[Any]:
        """The first blocks of `text`, as many as are here without a gap: pieces for `Cache.copy_in`."""
        found = list(takewhile(self._blocks.__contains__, self.keys(text)))
        self._touch(found)
        return [self._blocks[key] for key in found]

    def keep(self, cache: Cache, row: int, text: Sequence[int]) -> list[Any]:
        """Copy the whole blocks of `text`, which `row` of `cache` has read, and return them.

        Blocks that are here already are not copied again. Those behind one that the cache keeps no longer are
        of no use.
        """
        keys, pieces = self.keys(text), []
        for number, key in enumerate(keys):
            if key not in self._blocks:
                start = number * self.block
                if (piece := cache.copy_out(row, start, start + self.block)) is None:
                    break
                self._blocks[key] = piece
            pieces.append(self._blocks[key])
        self._touch(keys[: len(pieces)])
        while len(self._blocks) > self._room:
            self._blocks.popitem(last=False)
        return pieces

    def read(self, model: LanguageModel, texts: Sequence[list[int]]) -> tuple[list[list[Any]], int]:
        """Read `texts`, of which equally many tokens are known (see `alike`), and keep their blocks.

        One forward reads what is not known of any of them, padded on the right. Returns the pieces of each,
        for `Cache.copy_in`, and how many tokens were read.
        """
        found = [self.find(text) for text in texts]
        known, longest = len(found[0]) * self.block, max(map(len, texts))
        cache = model.new_cache(len(texts), longest)
        if known:
            cache.copy_in(found)
        sound = [True] * len(texts)
        if longest > known:
            # padded with a token of its own, so that not even the slots it never sees depend on anything else
            rests = [text[known:] + text[:1] * (longest - len(text)) for text in texts]
            logits_BTV = model(torch.tensor(rests, device=model.device), cache)
            last_BV = torch.stack([logits_BTV[row, len(text) - known - 1] for row, text in enumerate(texts)])
            sound = (~last_BV.isnan().any(-1)).tolist()
        pieces = []
        for row, text in enumerate(texts):
            # a token that gives NaN spoils those before it, too: hidden from them, it counts 0 times NaN
            blocks = self.keep(cache, row, text) if sound[row] else []
            blocks = max(found[row], blocks, key=len)
            pieces.append([*blocks, cache.copy_out(row, len(blocks) * self.block, len(text))])
        return pieces, sum(map(len, texts)) - known * len(texts)

    def alike(self, texts: Sequence[Sequence[int]], most: int) -> list[int]:
        """Which of `texts`, by number, one forward should read: the longest, and others like it.

        Of each equally many tokens are known; no two share a block that is not (once the first is read, the
        second need not be); at most half of each row is padding; all rows together hold at most `most`
        tokens, unless it is one.
        """
        known = [len(self.find(text)) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        first, coming, chosen = order[0], set[tuple[int, ...]](), list[int]()
        unread = len(texts[first]) - known[first] * self.block
        for i in order:
            new = self.keys(texts[i])[known[first] :]
            same = known[i] == known[first] and coming.isdisjoint(new)
            rest = len(texts[i]) - known[i] * self.block
            if not chosen or (same and 2 * rest >= unread and (len(chosen) + 1) * unread <= most):
                chosen.append(i)
                coming.update(new)
        return chosen

    def _touch(self, keys: list[tuple[int, ...]]) -> None:
        for key in reversed(keys):  # a block is of no use without those before it: they stay longer
            self._blocks.move_to_end(key)
