"""What is speculative decoding worth on a CPU? The same texts, with a draft and without, in turns.

The shipped model writes 256 tokens after each of several prompts of 32 from the validation text, one text at
a time: by our own `greedy` and `sample`, and by `speculative` with each kind of draft. The bars are 2.0 times
the tokens a second greedily, where the tokens must be the same, and 1.4 times sampled. With --smollm2 also
SmolLM2-135M, which is asked to quote its prompt. Then what reading several tokens in one forward costs, which
says what there is to gain. All of it twice: with the models' own steps, and with steps in C++ (`native`).
"""

import argparse
import itertools
import os
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, for all: see thread_waits.py

import measure
import torch

from lmtutorial.corpora import load_corpus
from lmtutorial.decode.guesses import FirstGuess, NGramTable, PromptLookup
from lmtutorial.decode.prompts import decoding
from lmtutorial.decode.sampling import greedy, sample
from lmtutorial.decode.speculative import Speculation, speculative
from lmtutorial.models.ngram import NGram
from lmtutorial.native import native
from lmtutorial.pretrained import load_pretrained

PROMPT = 32
SETTINGS = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0, "seed": 0}}


def plain(model, prompts, new, options):
    write = greedy if options["temperature"] == 0 else partial(sample, **options)
    return [write(model, [prompt], new)[0] for prompt in prompts]


def drafted(model, draft, prompts, new, options, reports=None):
    found = []
    for prompt in prompts:
        report = Speculation()
        found += speculative(model, draft, [prompt], new, report=report, **options)
        if reports is not None:
            reports.append(report)
    return found


def compare(name, model, drafts, prompts, new, threads, kinds=SETTINGS):
    """A row for each draft and setting: tokens a second, beside those of plain decoding."""
    for kind, options in kinds.items():
        for label, (draft, lookahead) in drafts.items():
            options = {**options, "lookahead": lookahead}
            without = {key: value for key, value in options.items() if key != "lookahead"}
            reports = []
            ours = drafted(model, draft, prompts, new, options, reports)
            same = [g.tokens for g in ours] == [g.tokens for g in plain(model, prompts, new, without)]
            seconds, peer_seconds = measure.alternate(
                partial(drafted, model, draft, prompts, new, options),
                partial(plain, model, prompts, new, without),
            )
            proposed = sum(sum(map(sum, report.proposed)) for report in reports)
            accepted = sum(sum(map(sum, report.accepted)) for report in reports)
            tokens, calls = len(prompts) * new, sum(report.calls for report in reports)
            yield {
                "benchmark": "speculative",
                "name": f"{name}, {kind}, draft: {label}, lookahead {lookahead}",
                "value": round(tokens / seconds, 1),
                "unit": "tokens/s",
                "peer": "our plain decoding",
                "peer_value": round(tokens / peer_seconds, 1),
                "ratio": peer_seconds / seconds,
                "same_tokens": same if kind == "greedy" else None,
                "acceptance_rate": round(accepted / max(proposed, 1), 3),
                "tokens_per_call": round(tokens / calls, 2),
                "threads": threads,
            }


def cost_of_reading(name, model, threads, after=150):
    """A row for each width: how much longer a forward over several tokens takes than one over one."""

    def read(width):
        with decoding(model):
            for _ in range(20):
                cache.truncate(torch.tensor([after]))
                model(torch.zeros(1, width, dtype=torch.int64), cache)

    with decoding(model):
        cache = model.new_cache(1, after + 16)
        model(torch.zeros(1, after, dtype=torch.int64), cache)
    for width in (2, 3, 5, 9):
        several, one = (
            seconds / 20 * 1e3 for seconds in measure.alternate(partial(read, width), partial(read, 1))
        )
        yield {
            "benchmark": "speculative",
            "name": f"{name}, one forward over {width} tokens",
            "value": round(several, 3),
            "unit": "ms",
            "peer": "over 1 token",
            "peer_value": round(one, 3),
            "ratio": several / one,
            "threads": threads,
        }


def shakespeare(name, count, new, threads):
    model, tokenizer, _ = load_pretrained(name)
    corpus = load_corpus("shakespeare")
    text = tokenizer.encode_array(corpus.text("validation")).tolist()
    prompts = [text[i * len(text) // count :][:PROMPT] for i in range(count)]
    counted = NGram.train(tokenizer.encode_array(corpus.text("train")), 4, tokenizer.vocab_size)
    lookup = FirstGuess(PromptLookup(4, 2), NGramTable(counted))
    small = load_pretrained("shakespeare-draft").model
    drafts = {
        "prompt lookup": (PromptLookup(), 8),
        "lookup, else n-gram table": (lookup, 8),
        "n-gram model": (counted, 2),
        "0.4M Transformer": (small, 4),
        "0.4M Transformer, native": (native(small), 4),
    }
    yield compare("shakespeare", model, drafts, prompts, new, threads)
    yield cost_of_reading("shakespeare", model, threads)
    drafts = {name: drafts[name] for name in ("lookup, else n-gram table", "0.4M Transformer, native")}
    yield compare("shakespeare, native", native(model), drafts, prompts, new, threads)
    yield cost_of_reading("shakespeare, native", native(model), threads)


def smollm2(threads):
    model, tokenizer, _ = load_pretrained("smollm2-135m")
    play = load_corpus("shakespeare").text("validation")[:600]
    request = f"<|im_start|>user\nRepeat this text word for word:\n{play}<|im_end|>\n<|im_start|>assistant\n"
    prompts = [tokenizer.encode(request, specials=True)]
    drafts = {"prompt lookup": (PromptLookup(), 4)}
    for name, steps in (("smollm2-135m", model), ("smollm2-135m, native", native(model))):
        yield compare(f"{name}, quotes", steps, drafts, prompts, 64, threads)
        yield cost_of_reading(name, steps, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shakespeare", help="a name or folder that load_pretrained knows")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--new", type=int, default=256, help="tokens after each prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M too")
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    questions = [shakespeare(options.model, options.prompts, options.new, options.threads)]
    if options.smollm2:
        questions.append(smollm2(options.threads))
    for rows in itertools.chain(*questions):
        measure.report(rows, keep=options.record)


if __name__ == "__main__":
    main()
