"""Does a tree search find better texts than sampling many, when the model reads equally many tokens?

The next line of verse after passages of Macbeth and Measure for Measure, which the small Shakespeare model
has not seen, by two rewards that anyone can check, from 0 to 1: `meter`, a line of ten syllables (counted as
groups of vowels), and `rhyme`, a last word that shares its last three letters with that of the line before.

Monte-Carlo tree search goes first; what its model read for a prompt is then the budget of every other method
for that prompt: best of as many samples, the best by reward of as many beams. Prints mean and standard error
of the reward over prompts, the share of perfect lines, and nats a token under the model (fluency: lower).
"""

import argparse
import re
from statistics import mean, stdev

import torch
from measure import record

from lmtutorial.corpora import load_corpus
from lmtutorial.decode.beam import beam_search
from lmtutorial.decode.mcts import mcts
from lmtutorial.decode.sampling import greedy, sample
from lmtutorial.pretrained import load_pretrained

MODEL = "shakespeare-draft"


def syllables(line):
    """Groups of vowels, a silent e at the end of a word left out; each word has one at least.

    >>> syllables("To be, or not to be, that is the question"), syllables("the little house")
    (11, 4)
    """
    return sum(map(_syllables, re.findall(r"[a-z']+", line.lower())))


def _syllables(word):
    silent = re.sub(r"(?<=[^aeiouyl])(?:es?|ed)$|(?<=[aeiouy]l)e$", "", word)
    return max(1, len(re.findall(r"[aeiouy]+", silent)))


def meter(before, line):
    """1 for ten syllables, 0.2 less for each too many or too few."""
    return max(0.0, 1 - 0.2 * abs(syllables(line) - 10))


def rhyme(before, line):
    """The share of the last three letters that the last words of two lines have in common; 0 for one word.

    >>> rhyme("Shall I compare thee to a day?", "Thy eternal way."), rhyme("the day", "a day")
    (0.6666666666666666, 0.0)
    """
    one, other = (re.sub(r"[^a-z]", "", (text.lower().split() or [""])[-1]) for text in (before, line))
    if one == other:
        return 0.0
    letters = 0
    while letters < min(3, len(one), len(other)) and one[-1 - letters] == other[-1 - letters]:
        letters += 1
    return letters / 3


def passages(text, number):
    """Four lines of verse each, which a fifth follows, evenly spread over the text."""
    lines = text.split("\n")
    verse = [
        "\n".join(lines[i - 3 : i + 1]) + "\n"
        for i in range(3, len(lines) - 1)
        if all(30 < len(line) < 60 and line[0].isupper() for line in lines[i - 3 : i + 2])
        and re.search("[a-z,;:]$", lines[i])  # the speech goes on
    ]
    return verse[:: max(1, len(verse) // number)][:number]


class Task:
    """One reward over one set of prompts."""

    def __init__(self, model, tokenizer, score, prompts, max_new_tokens):
        self.model, self.tokenizer, self.score, self.limit = model, tokenizer, score, max_new_tokens
        self.prompts = [tokenizer.encode(prompt) for prompt in prompts]
        self.before = {
            tuple(ids): text.split("\n")[-2] for ids, text in zip(self.prompts, prompts, strict=True)
        }
        self.eos = {i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])}

    def reward(self, prompt, tokens):
        """A line that does not end is worth nothing, and so is an empty one."""
        line, end, _ = self.tokenizer.decode(tokens).partition("\n")
        return self.score(self.before[tuple(prompt)], line) if end and line.strip() else 0.0

    def mcts(self, seed, **options):
        """The texts, and how many new tokens the model read for each prompt."""
        trees = {}
        texts = mcts(
            self.model, self.prompts, self.limit, reward=self.reward, eos=self.eos, seed=seed,
            on_step=lambda tree: trees.update({tree.row: tree}), **options,
        )  # fmt: skip
        return texts, [trees[i].positions - len(prompt) for i, prompt in enumerate(self.prompts)]

    def best_of(self, budgets, seed, temperature):
        """The best of as many samples as the budget allows, at least one."""
        return [
            self._best(prompt, self._samples(prompt, budget, seed, temperature))
            for prompt, budget in self._with(budgets)
        ]

    def _samples(self, prompt, budget, seed, temperature):
        most = [prompt] * (budget // 4 + 1)
        options = {"temperature": temperature, "top_k": 50, "eos": self.eos, "seed": seed}  # top_k as mcts's
        drawn = sample(self.model, most, self.limit, **options)
        kept, read = [], 0
        for text in drawn:
            read += len(text.tokens) - 1  # nobody asks what follows the last token
            if kept and read > budget:
                break
            kept.append(text)
        return kept

    def beam(self, budgets, seed):
        """The best of as many beams as the budget allows."""
        found = []
        for prompt, budget in self._with(budgets):
            width = max(1, budget // (self.limit - 1))
            [beams] = beam_search(self.model, [prompt], self.limit, width=width, n_best=width, eos=self.eos)
            found.append(self._best(prompt, beams))
        return found

    def _with(self, budgets):
        return zip(self.prompts, budgets, strict=True)

    def _best(self, prompt, texts):
        return max(texts, key=lambda text: (self.reward(prompt, text.tokens), text.logprob))  # as mcts does

    def row(self, name, texts, budgets):
        """What a method reached, as a row for the ledger."""
        rewards = [self.reward(prompt, text.tokens) for prompt, text in zip(self.prompts, texts, strict=True)]
        return {
            "benchmark": "search",
            "name": f"{self.score.__name__}, {name}",
            "value": mean(rewards),
            "unit": "mean reward",
            "error": stdev(rewards) / len(rewards) ** 0.5,
            "perfect": mean(reward == 1 for reward in rewards),
            "nats_per_token": -sum(t.logprob for t in texts) / sum(len(t.tokens) for t in texts),
            "positions": mean(budgets),
            "prompts": len(rewards),
        }


def rows(task, simulations, seed):
    """All methods, the others at the budgets of searches of several sizes."""
    one = [task.limit - 1]
    yield task.row("greedy", greedy(task.model, task.prompts, task.limit, eos=task.eos), one)
    plain = sample(task.model, task.prompts, task.limit, eos=task.eos, seed=seed)
    yield task.row("one sample", plain, one)
    for number in simulations:
        for rollout in ("greedy", "sample"):
            texts, budgets = task.mcts(seed, simulations=number, rollout=rollout)
            yield task.row(f"mcts, {number} simulations, rollout={rollout}", texts, budgets)
            for temperature in (1.0, 0.5):
                texts = task.best_of(budgets, seed, temperature)
                yield task.row(f"  best of samples, temperature {temperature}", texts, budgets)
            yield task.row("  best of beams", task.beam(budgets, seed), budgets)


def line(row):
    """A row as aligned text."""
    return (
        f"{row['name']:44} {row['value']:6.3f} ± {row['error']:.3f}   perfect {row['perfect']:4.0%}   "
        f"{row['nats_per_token']:5.2f} nats/token   {row['positions']:6.0f} positions"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--simulations", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append the rows to benchmarks/results.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer, _ = load_pretrained(MODEL)
    prompts = passages(load_corpus("shakespeare").text("validation"), arguments.prompts)
    for score in (meter, rhyme):
        task = Task(model, tokenizer, score, prompts, arguments.tokens)
        for row in rows(task, arguments.simulations, arguments.seed):
            print(line(row), flush=True)
            if arguments.record:
                record(row)


if __name__ == "__main__":
    main()
