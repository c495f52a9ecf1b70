"""Small models that show decoders at fault: one that remembers every token, one that trusts no cache."""

from itertools import chain

import torch


class StateCache:
    """What a row's history hashes to after 0, 1, 2 ... tokens."""

    def __init__(self, batch, max_len):
        self.states = torch.zeros(batch, max_len + 1, dtype=torch.int64)
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def reorder(self, rows):
        self.states, self.lengths = self.states[rows], self.lengths[rows]

    def truncate(self, lengths):
        assert (lengths <= self.lengths).all()
        self.lengths = lengths.clone()

    def copy_out(self, row, start, stop):
        return self.states[row, start + 1 : stop + 1].clone()

    def copy_in(self, rows, to=None):
        self.lengths = self.lengths.clone()
        for row, pieces in zip(range(len(rows)) if to is None else to, rows, strict=True):
            states = torch.cat(pieces)
            self.states[row, 1 : len(states) + 1] = states
            self.lengths[row] = len(states)

    def detach(self):
        pass


class HistoryModel:
    """Random logits that change with any token of the history: one read too many or in the wrong row shows.

    All of its arithmetic is exact, so a batch cannot differ from its rows by rounding. With `ties` the logits
    are small integers, so that several tokens are often equally likely.
    """

    device = torch.device("cpu")
    states = 997

    def __init__(self, vocab_size=12, seed=0, context=None, ties=False):
        self.vocab_size, self.context = vocab_size, context
        table = torch.randn(self.states, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
        self.table = table.round() if ties else table
        self.forwards = []

    def __call__(self, tokens, cache=None):
        self.forwards.append(tuple(tokens.shape))
        cache = cache or self.new_cache(*tokens.shape)
        rows = torch.arange(len(tokens))
        logits = []
        for column in tokens.unbind(1):
            state = (cache.states[rows, cache.lengths] * 31 + column + 1) % self.states
            cache.lengths = cache.lengths + 1
            cache.states[rows, cache.lengths] = state
            logits.append(self.table[state])
        return torch.stack(logits, dim=1)

    def new_cache(self, batch, max_len):
        return StateCache(batch, max_len)


class TextCache:
    def __init__(self, batch):
        self.texts = [[] for _ in range(batch)]

    @property
    def lengths(self):
        return torch.tensor([len(text) for text in self.texts])

    def reorder(self, rows):
        self.texts = [list(self.texts[row]) for row in rows.tolist()]

    def truncate(self, lengths):
        self.texts = [text[:length] for text, length in zip(self.texts, lengths.tolist(), strict=True)]

    def copy_out(self, row, start, stop):
        return self.texts[row][start:stop]

    def copy_in(self, rows):
        self.texts = [list(chain(*pieces)) for pieces in rows]


class Rereading:
    """A model without its cache: every row is read from its first token again, alone, at every step."""

    def __init__(self, model):
        self.model = model
        self.vocab_size, self.context, self.device = model.vocab_size, model.context, model.device

    def __call__(self, tokens, cache):
        rows = []
        for text, new in zip(cache.texts, tokens.tolist(), strict=True):
            text.extend(new)
            rows.append(self.model(torch.tensor([text], device=self.device))[0, -len(new) :])
        return torch.stack(rows)

    def new_cache(self, batch, max_len):
        return TextCache(batch)
