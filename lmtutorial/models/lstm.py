"""The LSTM language model: embedding -> LSTM -> linear head, with a cache that can go back.

Sources: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 1997; the forget gate of
Gers et al., Neural Computation 2000; the tied head of Press and Wolf, EACL 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtutorial.models.cache import Cache

EMBEDDING_STD = 0.2
"""Of fresh embeddings, tied or not. Adam moves every entry by about the learning rate, so entries that start
much smaller (width**-0.5, for example) are soon all noise and learn far slower: benchmarks/lstm_start.py."""


@dataclass(frozen=True)
class LSTMConfig:
    """The shape of an LSTM language model.

    >>> LSTMConfig(vocab_size=10_000).width
    512
    """

    vocab_size: int
    """How many tokens the model knows."""
    width: int = 512
    """The size of the embedding and of each layer's state."""
    layers: int = 1
    """How many LSTM layers lie on each other."""
    dropout: float = 0.0
    """The share of activations dropped in training: after the embedding, between layers, before the head."""
    tied: bool = True
    """Whether the head shares the embedding's matrix."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


class LSTM(nn.Module):
    """An LSTM that gives the logits of each next token; a `LanguageModel`.

    >>> model = LSTM(LSTMConfig(vocab_size=65, width=32))
    >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
    torch.Size([2, 7, 65])
    """

    context = None

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        between = config.dropout if config.layers > 1 else 0.0
        self.lstm = nn.LSTM(config.width, config.width, config.layers, batch_first=True, dropout=between)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()
        if config.tied:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Draw fresh weights; forget gates start open (bias 1: Jozefowicz et al., ICML 2015)."""
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)
        nn.init.zeros_(self.head.bias)
        self.lstm.reset_parameters()
        for layer in range(self.config.layers):
            forget = slice(self.config.width, 2 * self.config.width)
            with torch.no_grad():
                getattr(self.lstm, f"bias_ih_l{layer}")[forget].fill_(1.0)
                getattr(self.lstm, f"bias_hh_l{layer}")[forget].zero_()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of each next token: (batch, time) int64 -> (batch, time, vocab_size)."""
        x_BTC = self.dropout(self.embedding(tokens))
        x_BTC = self.lstm(x_BTC)[0] if cache is None else self._continue(x_BTC, cache)
        return self.head(self.dropout(x_BTC))  # type: ignore[no-any-return]

    def _continue(self, x_BTC: Tensor, cache: Cache) -> Tensor:
        if isinstance(cache, LSTMStream):
            x_BTC, cache.state = self.lstm(x_BTC, cache.state)
            cache.lengths = cache.lengths + x_BTC.shape[1]
            return x_BTC
        assert isinstance(cache, LSTMCache)
        return torch.stack([self._step(x_BC, cache) for x_BC in x_BTC.unbind(1)], dim=1)

    def _step(self, x_BC: Tensor, cache: LSTMCache) -> Tensor:
        """One token a row, through every layer; the cache keeps the state after it."""
        h_LBC, c_LBC = cache.last()
        hs, cs = [], []
        for layer, weights in enumerate(self.lstm.all_weights):
            h_BC, c_BC = lstm_step(x_BC, h_LBC[layer], c_LBC[layer], *weights)
            hs.append(h_BC)
            cs.append(c_BC)
            x_BC = F.dropout(h_BC, self.lstm.dropout, self.training)
        cache.append(torch.stack(hs), torch.stack(cs))
        return hs[-1]

    def new_cache(self, batch: int, max_len: int | None) -> LSTMCache | LSTMStream:
        """A cache that keeps the state after each of `max_len` tokens, or with None only the last state."""
        shape = (self.config.layers, batch, self.config.width)
        blank = torch.zeros(shape, dtype=self.embedding.weight.dtype, device=self.device)
        return LSTMStream(blank) if max_len is None else LSTMCache(blank, max_len)


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """The LSTM cell, one step: input x and state (h, c), all (batch, width), to the next state (h, c).

    The weights are (4 width, width), the biases (4 width,), stacked in torch's order: input gate, forget
    gate, candidate, output gate. Equal to `nn.LSTMCell`.

    >>> weight, bias, blank = torch.zeros(12, 3), torch.zeros(12), torch.zeros(2, 3)
    >>> h, c = lstm_step(blank, blank, torch.ones(2, 3), weight, weight, bias, bias)
    >>> c[0]  # without input the forget gate stands half open
    tensor([0.5000, 0.5000, 0.5000])
    """
    gates = F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()  # forget some of the old, write some of the new
    h = o.sigmoid() * c.tanh()  # show some of it
    return h, c


class LSTMCache:
    """The state after each token, so that going back is choosing an earlier one.

    `states` is (batch, max_len + 1, 2, layers, width): h and c after 0, 1, ... tokens; after 0 they are zero.
    """

    def __init__(self, blank_LBC: Tensor, max_len: int) -> None:
        layers, batch, width = blank_LBC.shape
        self.states = blank_LBC.new_zeros(batch, max_len + 1, 2, layers, width)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=blank_LBC.device)
        self._rows = torch.arange(batch, device=blank_LBC.device)

    def last(self) -> tuple[Tensor, Tensor]:
        """The state (h, c) of each row, each (layers, batch, width)."""
        h, c = self.states[self._rows, self.lengths].permute(1, 2, 0, 3)
        return h, c

    def append(self, h_LBC: Tensor, c_LBC: Tensor) -> None:
        """Keep the state after one more token of each row."""
        self.lengths = self.lengths + 1
        self.states[self._rows, self.lengths] = torch.stack([h_LBC, c_LBC]).permute(2, 0, 1, 3)

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        self.states = self.states[rows]
        self.lengths = self.lengths[rows]
        self._rows = torch.arange(len(rows), device=rows.device)

    def truncate(self, lengths: Tensor) -> None:
        """Go back to the state after the first `lengths[b]` tokens of row b."""
        self.lengths = lengths.to(self.lengths)

    def copy_out(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of the states after each of a row's tokens, (tokens, 2, layers, width)."""
        return self.states[row, start + 1 : stop + 1].clone()

    def copy_in(self, rows: Sequence[Sequence[Tensor]], to: Sequence[int] | None = None) -> None:
        """Row b, or `to[b]`, becomes one that has read the pieces `rows[b]`."""
        to = range(len(rows)) if to is None else to
        lengths = [sum(map(len, pieces)) for pieces in rows]
        for row, pieces, length in zip(to, rows, lengths, strict=True):
            torch.cat(list(pieces), out=self.states[row, 1 : length + 1])
        new = torch.tensor([list(to), lengths], dtype=torch.int64, device=self.lengths.device)
        self.lengths = self.lengths.index_copy(0, *new)

    def detach(self) -> None:
        """Cut the graph."""
        self.states = self.states.detach()


class LSTMStream:
    """The last state only: what truncated backpropagation through time carries from batch to batch."""

    def __init__(self, blank_LBC: Tensor) -> None:
        self.state = (blank_LBC, blank_LBC)
        self.lengths = torch.zeros(blank_LBC.shape[1], dtype=torch.int64, device=blank_LBC.device)

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        self.state = (self.state[0][:, rows], self.state[1][:, rows])
        self.lengths = self.lengths[rows]

    def truncate(self, lengths: Tensor) -> None:
        """An endless stream keeps no earlier state to go back to."""
        raise ValueError("this cache keeps only the last state; ask for new_cache(batch, max_len) to go back")

    def copy_out(self, row: int, start: int, stop: int) -> Tensor:
        """An endless stream keeps no earlier state to copy."""
        raise ValueError("this cache keeps only the last state; ask for new_cache(batch, max_len) to copy")

    def copy_in(self, rows: Sequence[Sequence[Tensor]], to: Sequence[int] | None = None) -> None:
        """An endless stream keeps no earlier state to copy."""
        self.copy_out(0, 0, 0)

    def detach(self) -> None:
        """Cut the graph."""
        self.state = (self.state[0].detach(), self.state[1].detach())
