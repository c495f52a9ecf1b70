"""Tokenizers of published models: byte-level BPE with the ids that the models were trained with.

Hugging Face's `tokenizer.json` and GGUF files both hold a vocabulary (token to id) and a list of merges. The
merges are applied as in `lmtutorial.bpe`; what differs is the numbering, and how digits are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from lmtutorial.bpe import FIRST_MERGE, Pair
from lmtutorial.bpe_library import BPETokenizer, byte_letters, library_tokenizer
from lmtutorial.vocabulary import END_OF_TEXT, Ids
from lmtutorial.words import digit_pattern


class PublishedBPE(BPETokenizer):
    """Byte-level BPE whose tokens have any ids, with the special tokens anywhere among them.

    ids: the id of each token, in the order bytes 0 to 255, merges, special tokens; together 0 to
    `vocab_size - 1`. None for a byte that the vocabulary lacks: text that holds it raises ValueError.
    split_digits: whether each digit is a word of its own, as in SmolLM2, or a run of digits is, as in GPT-2.
    ends_with: the special token that is `eos`; None takes `<|endoftext|>` or `<eos>`, if there is one.

    >>> letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    >>> vocabulary = {**letters, "<eos>": 26, "lo": 27, "low": 28}
    >>> tokenizer = PublishedBPE.from_vocabulary(vocabulary, ["l o", "lo w"], specials=["<eos>"])
    >>> tokenizer.encode("slow<eos>", specials=True), tokenizer.decode([18, 28]), tokenizer.eos
    ([18, 28, 26], 'slow', 26)
    """

    kind = "published bpe"

    def __init__(
        self,
        merges: Sequence[Sequence[int]],
        *,
        ids: Sequence[int | None],
        specials: Sequence[str] = (END_OF_TEXT,),
        split_digits: bool = False,
        ends_with: str | None = None,
    ) -> None:
        super().__init__(merges, specials=specials)
        if len(ids) != self.vocab_size:
            raise ValueError(f"there are {len(ids):,} ids for {self.vocab_size:,} tokens")
        if ends_with is not None and ends_with not in self.specials:
            raise ValueError(f"ends_with is {ends_with!r}; it must be one of {list(self.specials)}")
        new = np.array([-1 if i is None else i for i in ids])
        old = np.argsort(new)[np.count_nonzero(new < 0) :]  # the token that has each id
        if not np.array_equal(new[old], np.arange(len(old))) or (new[FIRST_MERGE:] < 0).any():
            raise ValueError(f"ids must be 0 to {len(old) - 1}, each once, and only bytes may have none")
        self.ids, self.split_digits, self.ends_with = list(ids), split_digits, ends_with
        self._new = new
        self._plain, self._named = [self._plain[i] for i in old], [self._named[i] for i in old]
        self.token_bytes, self.vocab_size = self.token_bytes[old], len(old)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.specials = {name: int(new[i]) for name, i in self.specials.items()}
        self.unk = None if self.unk is None else int(new[self.unk])
        if ends_with is not None:
            self.eos = self.specials[ends_with]
        elif self.eos is not None:
            self.eos = int(new[self.eos])

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: Mapping[str, int],
        merges: Iterable[str | Sequence[str]],
        *,
        specials: Sequence[str] = (END_OF_TEXT,),
        split_digits: bool = False,
        ends_with: str | None = None,
    ) -> PublishedBPE:
        """The tokenizer of a vocabulary and of merges as they are published: "Ġt he", a letter for each byte.

        Raises ValueError for merges of tokens that do not exist yet, and for a vocabulary that holds other
        tokens than bytes, merges and special tokens, or lacks one of the latter two.
        """
        names = byte_letters()
        known = {name: i for i, name in enumerate(names) if name in vocabulary}
        pairs: list[Pair] = []
        for merge in merges:
            parts = merge.split(" ") if isinstance(merge, str) else list(merge)
            if len(parts) != 2 or not set(parts) <= known.keys():
                raise ValueError(f"merge {len(pairs)} is {merge!r}; it must be two tokens that exist by then")
            pairs.append((known[parts[0]], known[parts[1]]))
            known["".join(parts)] = len(names)
            names.append("".join(parts))
        names += specials
        if strangers := vocabulary.keys() - set(names):
            raise ValueError(
                f"{len(strangers):,} tokens are no byte, merge or special token, such as {min(strangers)!r}"
            )
        if lost := [name for name in names[FIRST_MERGE:] if name not in vocabulary]:
            raise ValueError(f"{len(lost):,} tokens are not in the vocabulary, such as {lost[0]!r}")
        ids = [vocabulary.get(name) for name in names]
        return cls(pairs, ids=ids, specials=specials, split_digits=split_digits, ends_with=ends_with)

    @classmethod
    def from_library(cls, state: Mapping[str, Any], *, ends_with: str | None = None) -> PublishedBPE:
        """The tokenizer of Hugging Face's `tokenizer.json`, already parsed.

        Raises ValueError for what is no byte-level BPE in GPT-2's manner, quoting what differs.
        """
        model, added = state.get("model", {}), state.get("added_tokens") or []
        plain = {"type": ("BPE", None), **dict.fromkeys(_PLAIN, (None, False, ""))}
        for key, allowed in plain.items():
            if model.get(key) not in allowed:
                raise ValueError(f"tokenizer.json: model.{key} is {model[key]!r}, which is not supported")
        if state.get("normalizer") is not None:
            raise ValueError(f"tokenizer.json: normalizer is {state['normalizer']!r}; it must be null")
        for token in added:
            if not token.get("special") or any(token.get(key) for key in ("single_word", "lstrip", "rstrip")):
                raise ValueError(
                    f"tokenizer.json: added token {token!r}; it must be special, and match exactly"
                )
        return cls.from_vocabulary(
            {**model["vocab"], **{token["content"]: token["id"] for token in added}},
            model["merges"],
            specials=[token["content"] for token in added],
            split_digits=_splits_digits(state.get("pre_tokenizer")),
            ends_with=ends_with,
        )

    def to_library(self) -> Any:
        """The same as a `tokenizers.Tokenizer`, ids included; it knows special tokens by id, not in text."""
        from tokenizers import pre_tokenizers
        from tokenizers.models import BPE as LibraryBPE

        letters = byte_letters()
        names = ["".join(letters[byte] for byte in piece) for piece in self._bpe.pieces]
        merges = [(names[left], names[right]) for left, right in self.merges]
        pairs = zip([*names, *self.specials], self.ids, strict=True)
        library = library_tokenizer(
            LibraryBPE(vocab={n: i for n, i in pairs if i is not None}, merges=merges)
        )
        if self.split_digits:
            digits = pre_tokenizers.Digits(individual_digits=True)
            library.pre_tokenizer = pre_tokenizers.Sequence([digits, library.pre_tokenizer])
        return library

    def _encode_plain(self, text: str) -> Ids:
        parts = digit_pattern().findall(text) if self.split_digits else [text]
        ids = self._new[np.fromiter(chain.from_iterable(map(self._bpe.iterate, parts)), dtype=np.int64)]
        if ids.size and ids.min() < 0:
            i, character = next((i, c) for i, c in enumerate(text) if min(self._new[list(c.encode())]) < 0)
            raise ValueError(
                f"text has {character!r} (U+{ord(character):04X}) at position {i}; this tokenizer lacks a "
                "token for one of its bytes"
            )
        return ids.astype(self.dtype)

    def _state(self) -> dict[str, Any]:
        rest = {"split_digits": self.split_digits, "ends_with": self.ends_with}
        return {"merges": self.merges, "ids": self.ids, **rest}


_PLAIN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")


def _splits_digits(state: Any) -> bool:
    """Whether a pre-tokenizer cuts as SmolLM2 (digits one by one) or as GPT-2; ValueError for any other."""
    outer = state or {}
    steps: list[dict[str, Any]] = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    if [step.get("type") for step in steps] in (["ByteLevel"], ["Digits", "ByteLevel"]):
        last, digits = steps[-1], steps[:-1]
        as_gpt2 = not last.get("add_prefix_space") and last.get("use_regex", True)
        if as_gpt2 and all(step.get("individual_digits") for step in digits):
            return bool(digits)
    raise ValueError(
        f"tokenizer.json: pre_tokenizer is {state!r}; it must be GPT-2's ByteLevel without add_prefix_space, "
        "alone or after Digits with individual_digits"
    )
