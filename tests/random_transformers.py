"""Small random Transformers of every kind, and reading in pieces, for the tests of fast steps."""

import torch
from hypothesis import strategies as st

from lmtutorial.models.transformer import Transformer, TransformerConfig

VOCAB = 12
SHAPES = {
    "gpt2": {"position": "learned", "norm": "layer", "mlp": "gelu"},
    "modern": {"kv_heads": 2, "qk_norm": True},
    "untied, relu2": {"kv_heads": 1, "mlp": "relu2", "tied": False},
    "odd sizes": {"width": 36, "heads": 2, "hidden": 21},
    "rows of 16": {"width": 64, "layers": 1, "hidden": 160},
}


def random_transformer(seed=0, **config):
    torch.manual_seed(seed)
    shape = {"context": 48, "width": 16, "layers": 2, "heads": 4, "dropout": 0.5, **config}
    model = Transformer(TransformerConfig(VOCAB, **shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


MODELS = [random_transformer(**shape) for shape in SHAPES.values()]
models = st.sampled_from(MODELS)
pieces = st.lists(st.integers(1, 7), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def read(model, tokens, pieces):
    with torch.no_grad():
        cache = model.new_cache(len(tokens), tokens.shape[1] + 1)
        return torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)


def tokens_of(generations):
    return [generation.tokens for generation in generations]


def draw_tokens(rows, time, seed):
    return torch.randint(VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))
