"""From tokens to text as they come: whole characters, and an end where a stop string begins.

A token of byte-level BPE may end amid a character, and a stop string may lie across tokens. What may still
become either is held back until the next tokens decide it.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence

from lmtutorial.decode.constraints import Allowed
from lmtutorial.decode.sampling import stream
from lmtutorial.models.cache import LanguageModel
from lmtutorial.vocabulary import Tokenizer


class TextStream:
    """The text of one stream of tokens, piece by piece.

    The pieces together are `tokenizer.decode` of all tokens, cut where a stop string begins: the one that is
    complete first, as tokens come; of several that end at once the longest. What is a part of a character, or
    may be the beginning of a stop string, is held back until it is known.

    >>> from lmtutorial.tokenizers import BPETokenizer
    >>> text = TextStream(BPETokenizer([]), stop=["\\n\\n"])  # a token for each byte
    >>> [text.push(token) for token in "né\\n.\\n\\n".encode()], text.stopped
    (['n', '', 'é', '', '\\n.', '', ''], True)
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), *, specials: bool = False
    ) -> None:
        """`stop` is a string or several, none empty; `specials` is that of `tokenizer.decode`."""
        self.stop = check_stop(stop)
        self.stopped = False
        """Whether a stop string was met; nothing comes after it."""
        self._tokenizer, self._specials = tokenizer, specials
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Read one more token; the text that is certain now, often none. ValueError for an unknown id."""
        return self._advance(self._tokenizer.decode_bytes([token], specials=self._specials), final=False)

    def finish(self) -> str:
        """No more tokens come: the text that was held back. An incomplete character becomes U+FFFD."""
        return self._advance(b"", final=True)

    def _advance(self, new: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + self._bytes.decode(new, final)
        place = _first_stop(text, self.stop)
        self.stopped = place is not None
        if place is None:
            place = len(text) if final else len(text) - _beginning(text, self.stop)
        self._held = "" if self.stopped else text[place:]
        return text[:place]


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop: str | Sequence[str] = (),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos: int | Collection[int] | None = None,
    seed: int | None = None,
    allowed: Allowed | None = None,
) -> Iterator[str]:
    """What `stream` writes after `prompt`, a text or token ids, as text: no piece empty, no character torn.

    The pieces together are `tokenizer.decode` of the new tokens, up to where a stop string begins; where one
    is met, no further token is computed. Arguments are checked when this is called; for the options and for
    what they raise see `sample`.

    >>> from lmtutorial.models.ngram import NGram
    >>> from lmtutorial.tokenizers import CharTokenizer
    >>> tokenizer = CharTokenizer("abc")
    >>> model = NGram.train(tokenizer.encode("abc" * 20), order=2, vocab_size=3)
    >>> list(stream_text(model, tokenizer, "a", 20, stop="ca", temperature=0))
    ['b']
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    text = TextStream(tokenizer, stop)
    tokens = stream(
        model, ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        typical_p=typical_p, repetition_penalty=repetition_penalty, eos=eos, seed=seed,
        allowed=allowed,
    )  # fmt: skip
    return _pieces(tokens, text)


def _pieces(tokens: Iterator[int], text: TextStream) -> Iterator[str]:
    for token in tokens:
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if piece := text.finish():
        yield piece


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings as a tuple. Raises TypeError for what is no string, ValueError for an empty one."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop holds {string!r}; it must be a string or a list of strings")
        if not string:
            raise ValueError("stop holds an empty string, which every text begins with; allowed is any other")
    return strings


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first; the longest, where several end at once."""
    starts = [(place + len(string), place) for string in stop if (place := text.find(string)) >= 0]
    return min(starts)[1] if starts else None


def _beginning(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(max(map(len, stop), default=0) - 1, len(text))
    for size in range(longest, 0, -1):
        if any(string.startswith(text[-size:]) for string in stop):
            return size
    return 0
