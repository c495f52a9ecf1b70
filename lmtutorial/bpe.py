"""Byte-pair encoding from scratch: how a tokenizer learns its vocabulary, and how it uses it.

Text is cut into words, and a word is a sequence of bytes, so token ids 0 to 255 are the bytes. Training
merges, again and again, the pair of neighboring tokens that is most frequent inside words; merge i makes
token 256 + i. Encoding a word applies the same merges in the same order.

`count_pairs`, `merge` and `learn_merges_plain` are the idea as one would write it down. `learn_merges` and
`BPE` compute the same thing fast, by two changes: only words that hold the merged pair are counted again, and
a word is a string whose characters are token ids, so that a merge is one call of `str.replace`.

Sources: Gage, "A new algorithm for data compression", 1994; Sennrich, Haddow and Birch, "Neural machine
translation of rare words with subword units", 2016; on bytes, as in GPT-2: Radford et al., 2019.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from operator import add, index

from lmtutorial.words import check_text, gpt2_pattern

Pair = tuple[int, int]
Word = tuple[int, ...]

FIRST_MERGE = 256  # the ids below are the bytes
LAST = chr(sys.maxunicode)  # comes after the character of every token


def count_pairs(words: Mapping[Word, int]) -> Counter[Pair]:
    """How often each two tokens stand side by side; `words` maps a word to how often it occurs.

    >>> count_pairs({(1, 2, 3): 10, (1, 2): 5})
    Counter({(1, 2): 15, (2, 3): 10})
    """
    pairs: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def merge(word: Word, pair: Pair, new: int) -> Word:
    """The word with every `pair` replaced by the token `new`, from left to right.

    >>> merge((1, 2, 3, 1, 2), (1, 2), 256)
    (256, 3, 256)
    >>> merge((1, 1, 1), (1, 1), 256)
    (256, 1)
    """
    merged: list[int] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def learn_merges_plain(words: Mapping[Word, int], merges: int, min_count: int = 2) -> list[Pair]:
    """The definition of BPE training: count every pair anew for each merge.

    Of equally frequent pairs the one with the smaller ids is merged first. Learning ends early where no pair
    occurs `min_count` times.

    >>> learn_merges_plain({tuple(b"low"): 5, tuple(b"lower"): 2, tuple(b"new"): 6}, merges=2)
    [(108, 111), (256, 119)]
    """
    learned: list[Pair] = []
    while len(learned) < merges:
        pairs = count_pairs(words)
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < min_count:
            break
        merged: Counter[Word] = Counter()
        for word, count in words.items():
            merged[merge(word, best, FIRST_MERGE + len(learned))] += count
        words = merged
        learned.append(best)
    return learned


def learn_merges(words: Mapping[str, int], merges: int, min_count: int = 2) -> list[Pair]:
    """The merges of `learn_merges_plain`, fast; the UTF-8 bytes of the strings `words` are merged.

    Counts are kept up to date instead of taken anew: `where` lists the words that a pair may be in, and the
    heap holds each pair with a count that was true once, which is checked when the pair comes to the top.

    >>> learn_merges({"low": 5, "lower": 2, "new": 6}, merges=2)
    [(108, 111), (256, 119)]
    """
    spelled, counts = [_bytes_as_characters(word) for word in words], list(words.values())
    pairs: defaultdict[str, int] = defaultdict(int)
    where: defaultdict[str, list[int]] = defaultdict(list)
    for i, word in enumerate(spelled):
        for pair in map(add, word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    learned: list[str] = []
    while heap and len(learned) < merges:
        count, best = heapq.heappop(heap)
        if pairs[best] != -count:  # some are used up; as counts only fall, no better pair is overlooked
            heapq.heappush(heap, (-pairs[best], best))
            continue
        if pairs[best] < min_count:
            break
        new = chr(FIRST_MERGE + len(learned))
        learned.append(best)
        with_new: set[str] = set()
        for i in set(where.pop(best)):
            old = spelled[i]
            word = spelled[i] = old.replace(best, new)
            if len(word) == len(old):  # an earlier merge took the pair out of this word
                continue
            for pair in map(add, old, old[1:]):
                pairs[pair] -= counts[i]
            for pair in map(add, word, word[1:]):
                pairs[pair] += counts[i]
                if new in pair:
                    where[pair].append(i)
                    with_new.add(pair)
        for pair in with_new:
            heapq.heappush(heap, (-pairs[pair], pair))
    return [(ord(pair[0]), ord(pair[1])) for pair in learned]


class BPE:
    """A byte-level tokenizer: any Unicode text to token ids and back, without loss.

    `merges[i]` is the pair of ids that makes token 256 + i; `pieces[id]` are the bytes a token stands for.
    Raises ValueError for a merge of tokens that do not exist yet, or that makes another token's bytes again.

    >>> bpe = BPE.train("low low low lower lower new new", vocab_size=258)
    >>> bpe.merges
    [(108, 111), (256, 119)]
    >>> bpe.encode("slow"), bpe.decode([115, 257])
    ([115, 257], 'slow')
    """

    def __init__(self, merges: Iterable[Sequence[int]]) -> None:
        self.merges: list[Pair] = []
        self.pieces = [bytes([byte]) for byte in range(FIRST_MERGE)]
        known = set(self.pieces)
        for i, pair in enumerate(merges):
            if len(pair) != 2 or not all(0 <= index(part) < len(self.pieces) for part in pair):
                raise ValueError(
                    f"merge {i} is {pair!r}; allowed are two token ids from 0 to {FIRST_MERGE + i - 1}"
                )
            left, right = map(index, pair)
            piece = self.pieces[left] + self.pieces[right]
            if piece in known:
                raise ValueError(
                    f"merge {i}, {pair!r}, makes {piece!r}, which token {self.pieces.index(piece)} is"
                )
            known.add(piece)
            self.merges.append((left, right))
            self.pieces.append(piece)
        made = {chr(left) + chr(right): chr(FIRST_MERGE + i) for i, (left, right) in enumerate(self.merges)}
        self._ids = _WordCache(made)

    @classmethod
    def train(cls, text: str, vocab_size: int, *, min_count: int = 2) -> BPE:
        """Learn `vocab_size - 256` merges, or fewer if no pair is left that occurs `min_count` times."""
        if vocab_size < FIRST_MERGE:
            raise ValueError(
                f"vocab_size is {vocab_size}; it must be at least {FIRST_MERGE}, one token per byte"
            )
        if min_count < 1:
            raise ValueError(f"min_count is {min_count}; it must be at least 1")
        check_text(text)
        words = Counter(gpt2_pattern().findall(text))
        return cls(learn_merges(words, vocab_size - FIRST_MERGE, min_count))

    @property
    def vocab_size(self) -> int:
        """256 bytes and one token for each merge."""
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`. Raises ValueError for a lone surrogate, which UTF-8 cannot carry."""
        return list(self.iterate(text))

    def iterate(self, text: str) -> Iterator[int]:
        """The same ids one by one: a corpus can be put into an array without being a list before."""
        check_text(text)
        return chain.from_iterable(map(self._ids.__getitem__, gpt2_pattern().findall(text)))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, or raise if `errors` is "strict"."""
        pieces = self.pieces
        return b"".join([pieces[i] for i in check_ids(ids, len(pieces))]).decode("utf-8", errors)


class _WordCache(dict[str, list[int]]):
    """The token ids of each word met so far, computed when they are first asked for."""

    LIMIT = 1 << 20  # words, so that a corpus of any size is encoded in bounded memory

    def __init__(self, made: dict[str, str]) -> None:
        self._made = made  # a pair, two characters, to the character of the token that it makes

    def __missing__(self, word: str) -> list[int]:
        spelled = _bytes_as_characters(word)
        while len(spelled) > 1:
            # The earliest merge that applies is the one that makes the smallest id.
            new, pair = min((self._made.get(pair, LAST), pair) for pair in map(add, spelled, spelled[1:]))
            if new == LAST:
                break
            spelled = spelled.replace(pair, new)
        if len(self) >= self.LIMIT:
            self.clear()
        ids = self[word] = list(map(ord, spelled))
        return ids


def _bytes_as_characters(word: str) -> str:
    """The word's UTF-8 bytes as a string of the characters 0 to 255, which is how Latin-1 reads them."""
    return word.encode("utf-8").decode("latin-1")


def check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids of one sequence (list, array or tensor) as a list; ValueError for the first out of range."""
    if getattr(ids, "ndim", 1) != 1:
        raise ValueError(
            f"ids have shape {tuple(getattr(ids, 'shape', ()))}; decode one sequence (time,) at a time"
        )
    listed: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if listed and not (min(listed) >= 0 and max(listed) < vocab_size):
        i = next(i for i, token in enumerate(listed) if not 0 <= token < vocab_size)
        raise ValueError(f"token id {listed[i]} at position {i} is not among the ids, 0 to {vocab_size - 1}")
    return listed
