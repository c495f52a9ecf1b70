"""What every model's cache promises, as four checks that the tests of each model run."""

import torch


def check_pieces(model, tokens, pieces, max_len):
    """Reading in pieces with a cache gives the logits of reading at once; `tokens` (rows, sum of pieces)."""
    with torch.no_grad():
        cache = model.new_cache(len(tokens), max_len)
        logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(tokens))
    assert cache.lengths.tolist() == [sum(pieces)] * len(tokens)


def check_going_back(model, keep, seed):
    """After truncation (to `keep`, 0 to 6) and reordering, rows go on as if nothing more had been read."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(keep), (3,), generator=draw)
    tokens = torch.randint(model.vocab_size, (len(keep), 6), generator=draw)
    new = torch.randint(model.vocab_size, (3, 2), generator=draw)
    with torch.no_grad():
        cache = model.new_cache(len(keep), 9)
        model(tokens, cache)
        cache.truncate(torch.tensor(keep))
        cache.reorder(rows)
        logits = model(new, cache)
        for b, row in enumerate(rows.tolist()):
            alone = torch.cat([tokens[row, : keep[row]], new[b]])[None]
            torch.testing.assert_close(logits[b], model(alone)[0, keep[row] :])


def check_copying(model, lengths, seed):
    """A row put together from pieces of other caches goes on as one that read those tokens itself."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (len(lengths), 8), generator=draw)
    new = torch.randint(model.vocab_size, (len(lengths), 1), generator=draw)
    with torch.no_grad():
        cache, other = model.new_cache(len(lengths), 8), model.new_cache(len(lengths), 9)
        model(tokens, cache)
        cuts = [int(torch.randint(length, (), generator=draw)) for length in lengths]
        pieces = [
            [cache.copy_out(row, 0, cut), cache.copy_out(row, cut, length)]
            for row, (cut, length) in enumerate(zip(cuts, lengths, strict=True))
        ]
        model(tokens.flip(1), other)  # what was in the rows before is gone
        cache.truncate(torch.zeros(len(lengths), dtype=torch.int64))
        model(tokens.flip(1), cache)  # and the copies do not follow the cache that they came from
        other.copy_in(pieces)
        assert other.lengths.tolist() == lengths
        logits = model(new, other)
        for b, length in enumerate(lengths):
            alone = torch.cat([tokens[b, :length], new[b]])[None]
            torch.testing.assert_close(logits[b], model(alone)[0, -1:])


def check_copying_to(model, lengths, seed):
    """Pieces copied into some rows change those alone, whatever the cache they come from and its room."""
    draw = torch.Generator().manual_seed(seed)
    source = torch.randint(model.vocab_size, (len(lengths), 8), generator=draw).to(model.device)
    tokens = torch.randint(model.vocab_size, (6, 3), generator=draw).to(model.device)
    new = torch.randint(model.vocab_size, (6, 1), generator=draw).to(model.device)
    places = torch.randperm(6, generator=draw)[: len(lengths)].tolist()
    with torch.no_grad():
        cache, other = model.new_cache(6, 9), model.new_cache(len(lengths), 8)
        model(tokens, cache)
        model(source, other)
        cache.copy_in([[other.copy_out(row, 0, length)] for row, length in enumerate(lengths)], places)
        texts = list(tokens)
        for place, row, length in zip(places, source, lengths, strict=True):
            texts[place] = row[:length]
        assert cache.lengths.tolist() == list(map(len, texts))
        for logits, text, token in zip(model(new, cache), texts, new, strict=True):
            torch.testing.assert_close(logits, model(torch.cat([text, token])[None])[0, -1:])
