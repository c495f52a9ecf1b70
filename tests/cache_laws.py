"""What every model's cache promises, as two checks that the tests of each model run."""

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
