"""The best of several samples by a reward: the baseline that a search has to beat."""

from __future__ import annotations

from collections.abc import Collection

from lmtutorial.decode.prompts import Prompts, check_prompts
from lmtutorial.decode.sampling import Generation, sample
from lmtutorial.decode.tree import Rate, check_count, check_function, checked
from lmtutorial.models.cache import LanguageModel


def best_of(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    reward: Rate,
    n: int = 16,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Collection[int] | None = None,
    seed: int | None = None,
) -> list[Generation]:
    """The best by `reward(prompt, new tokens)` of `n` samples after each of the prompts.

    The samples are those of `sample` after `n` copies of each prompt; of equals the first is taken. Raises
    what `sample` raises; ValueError or TypeError where a reward is not a finite number.

    >>> from lmtutorial.models.ngram import NGram
    >>> model = NGram.train([0, 1, 0, 1, 0, 2, 1, 2] * 9, order=2, vocab_size=3)
    >>> best_of(model, [[0]], 3, reward=lambda prompt, tokens: tokens.count(2), n=900, seed=0)[0].tokens
    [2, 2, 2]
    """
    check_function("reward", reward)
    check_count("n", n)
    ids = check_prompts(model, prompts, max_new_tokens)
    copies = [prompt for prompt in ids for _ in range(n)]
    texts = sample(
        model, copies, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos=eos, seed=seed
    )
    rewards = [checked("reward", reward, i // n, copies[i], text.tokens) for i, text in enumerate(texts)]
    groups = (range(row * n, (row + 1) * n) for row in range(len(ids)))
    return [texts[max(group, key=rewards.__getitem__)] for group in groups]
