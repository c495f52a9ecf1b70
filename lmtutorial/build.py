"""From the flags of a command to the tokenizer, the model and the batches that they ask for."""

from __future__ import annotations

from lmtutorial.batches import SlidingWindows, StreamBatches, Tokens, WindowBatches
from lmtutorial.commands import Train
from lmtutorial.corpora import Corpus
from lmtutorial.models.cache import LanguageModel
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, WordTokenizer


def build_tokenizer(command: Train, corpus: Corpus) -> Tokenizer:
    """A tokenizer learned from the training text alone."""
    text, size = corpus.text("train"), command.size.vocab_size
    if command.tokenizer == "char":
        return CharTokenizer.train(text, unk=True)  # the held-out text may use others
    if command.tokenizer == "bpe":
        return BPETokenizer.train(text, vocab_size=size)
    style = "wikitext" if corpus.name == "wikitext-2" else "plain"
    return WordTokenizer.train(text, vocab_size=size, style=style)


def build_model(command: Train, vocab_size: int) -> LSTM | Transformer:
    """A fresh model; the context of a Transformer is the `time` that it is trained on.

    >>> build_model(Train(model="gpt2"), vocab_size=50).config.position
    'learned'
    """
    size = command.size
    if command.model == "lstm":
        return LSTM(LSTMConfig(vocab_size, size.width, size.layers, size.dropout))
    shape = (vocab_size, command.time, size.width, size.layers, size.heads)
    if command.model == "gpt2":
        return Transformer(TransformerConfig.gpt2(*shape, dropout=size.dropout))
    return Transformer(TransformerConfig(*shape, kv_heads=size.kv_heads, dropout=size.dropout, qk_norm=True))


def build_batches(command: Train, tokens: Tokens) -> StreamBatches | WindowBatches:
    """Streams for a model that carries its state along, windows for one that reads them at once."""
    if command.model == "lstm":
        return StreamBatches(tokens, command.batch, command.time)
    return WindowBatches(tokens, command.batch, command.time, seed=command.training.seed)


def held_out_batches(model: LanguageModel, tokens: Tokens) -> StreamBatches | SlidingWindows:
    """A text to be measured on, so that few tokens have lost what came before them.

    A model without a limit reads few long streams; one with a limited context windows that overlap by half.
    """
    if model.context is None:
        return StreamBatches(tokens, batch=8, time=256)
    return SlidingWindows(tokens, batch=8, time=model.context)
