"""A cache that copies only what may differ holds what one that copies everything holds."""

import pytest
import torch

from lmtutorial.models import kv_cache
from lmtutorial.models.kv_cache import KVCache

LAYERS, HEADS, SIZE, ROOM = 2, 3, 2, 20


class Plain:
    """Rows of numbers, copied whole."""

    def __init__(self, batch):
        self.rows = [[] for _ in range(batch)]

    def extend(self, numbers):
        for row, new in zip(self.rows, numbers, strict=True):
            row.extend(new)

    def reorder(self, rows):
        self.rows = [list(self.rows[row]) for row in rows]

    def truncate(self, lengths):
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]


def extend(cache, numbers_BT):
    """Every key of a token is its number, every value the number behind the sign."""
    keys = numbers_BT[:, None, :, None].expand(-1, HEADS, -1, SIZE).float()
    cache.make_room(numbers_BT.shape[1])
    for layer in range(LAYERS):
        cache.extend(layer, keys + layer, -keys - layer)
    cache.advance()


def check(cache, plain):
    assert cache.lengths.tolist() == [len(row) for row in plain.rows]
    for b, row in enumerate(plain.rows):
        for layer in range(LAYERS):
            wanted = torch.tensor(row).float()[None, :, None].expand(HEADS, -1, SIZE) + layer
            assert cache.keys[layer, b, :, : len(row)].equal(wanted)
            assert cache.values[layer, b, :, : len(row)].equal(-wanted)
    assert cache.keys.isfinite().all()


@pytest.mark.parametrize("few", [kv_cache.FEW, 3])  # with 3, rows are now copied whole and now in part
@pytest.mark.parametrize("seed", range(200))
def test_rows_hold_what_was_read_whatever_was_reordered_cut_and_read_on_before(seed, few, monkeypatch):
    monkeypatch.setattr(kv_cache, "FEW", few)
    draw = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=draw)

    batch = int(integers(1, 6))
    cache = KVCache(LAYERS, batch, HEADS, ROOM, SIZE, like=torch.zeros(()))
    plain = Plain(batch)
    for _ in range(25):
        action = int(integers(0, 4))
        if action == 0:
            lengths = (cache.lengths * torch.rand(batch, generator=draw)).round().long()
            cache.truncate(lengths)
            plain.truncate(lengths.tolist())
        elif action == 1 or cache.lengths.max() > ROOM - 3:
            batch = int(integers(1, 6)) if integers(0, 4) == 0 else batch
            rows = integers(0, len(cache.lengths), batch)
            cache.reorder(rows)
            plain.reorder(rows.tolist())
        else:
            numbers = integers(0, 1000, batch, int(integers(1, 4)))
            extend(cache, numbers)
            plain.extend(numbers.tolist())
        check(cache, plain)


def test_what_copies_share_is_not_copied_again():
    cache = KVCache(LAYERS, 1, HEADS, ROOM, SIZE, like=torch.zeros(()))
    extend(cache, torch.arange(10)[None])
    cache.reorder(torch.zeros(4, dtype=torch.int64))
    memory = cache.keys.data_ptr()
    extend(cache, torch.arange(4)[:, None])
    cache.keys[:, 1:, :, :10] = torch.nan  # a mark: whoever copied these slots would show it
    cache.reorder(torch.tensor([1, 2, 3, 0]))
    assert cache.keys.data_ptr() == memory
    assert cache.keys[:, 0].isfinite().all()
    assert cache.keys[0, :, 0, 10, 0].tolist() == [1, 2, 3, 0]
