"""What --guidance_scale does to a model of pairs: does the answer keep to its prompt?

    python benchmarks/guidance_eval.py checkpoints/pairs --prompts 40 --samples 8

Held-out pairs whose response repeats a content word of its prompt: one of more than two letters
that is in less than --rare of the training pairs. Each prompt is answered --samples times at every
scale, left to right. Recall is the share of the prompts' content words that the answers have; "of
the pairs" is that of the held-out responses themselves. Behind it stands the standard error over
the prompts, and the difference from the scale before with its own. distinct-2: different pairs of
words in all answers, over all of them; known: words of the answers that the training pairs have.
The last line is JSON. Not part of CI.
"""
import itertools
import json
import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from harness import arguments  # first: it puts the repository on the path

import checkpoint
import config
from common import machine
from evaluation.sample_quality import distinct, words
from sampling.decode import generate
from sampling.settings import Settings, opening
from sampling.torch_model import writer_of
from text.dataset import TokenData

SCALES = (0.0, 1.0, 2.0, 3.0, 4.0)
COUNTED = 5000         # training pairs that say which words are rare


class Question(NamedTuple):
    """A held-out pair."""
    ids: list              # BOS prompt SEP
    asked: set             # content words of the prompt
    answered: set          # words of the response


def halves(ids, tokenizer):
    """The ids of a pair -> (ids up to SEP, the prompt, the response)."""
    ids = ids.tolist()
    cut = ids.index(tokenizer.pad_id)
    return ids[:cut + 1], tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut + 1:])


def words_of_training(data_dir, tokenizer):
    """How many of COUNTED pairs have a word, and how many pairs there were."""
    counts = Counter()
    number = 0
    for ids in itertools.islice(TokenData(data_dir, "train").documents(), COUNTED):
        counts.update(set(words(tokenizer.decode(ids.tolist()))))
        number += 1
    return counts, number


def questions(data_dir, tokenizer, common, count):
    """So many held-out pairs, evenly spread, whose response repeats a content word."""
    found = []
    for ids in TokenData(data_dir, "val").documents():
        begin, prompt, response = halves(ids, tokenizer)
        asked = {word for word in words(prompt) if len(word) > 2 and word not in common}
        answered = set(words(response))
        if asked & answered:
            found.append(Question(begin, asked, answered))
    step = max(1, len(found) // count)
    return found[::step][:count]


def answers(writer, tokenizer, question, settings, samples):
    """The words of so many answers."""
    rows = generate(writer, question.ids, settings, list(range(samples))).rows
    return [words(tokenizer.written(row)) for row in rows]


def recalled(question, texts):
    """The share of a prompt's content words in these answers, mean."""
    hits = [len(question.asked & set(text)) / len(question.asked) for text in texts]
    return sum(hits) / len(hits)


def mean_and_error(values):
    values = np.asarray(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def main():
    parser = arguments(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--data_dir", help="none = the one that it was trained on")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rare", type=float, default=0.02)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    args = parser.parse_args()

    model, tokenizer, saved = checkpoint.load_model(
        args.checkpoint, machine.pick_device("cpu"), config.check_saved
    )
    writer = writer_of(model)
    data_dir = args.data_dir or saved.config["args"]["data_dir"]
    counts, pairs = words_of_training(data_dir, tokenizer)
    common = {word for word, number in counts.items() if number >= args.rare * pairs}
    asked = questions(data_dir, tokenizer, common, args.prompts)
    gold, _ = mean_and_error([len(q.asked & q.answered) / len(q.asked) for q in asked])
    print(f"{len(asked)} prompts, {sum(len(q.asked) for q in asked)} content words; recall of the "
          f"pairs {gold:.3f}")

    document = {"prompts": len(asked), "recall_of_the_pairs": gold, "scales": {}}
    before = None
    for scale in args.scales:
        settings = Settings(
            args.tokens, 1, mode="block_frozen", block_size=1, temperature=args.temperature,
            guidance_scale=scale, null_prompt=tuple(opening(tokenizer, "", framed=True)),
            eos_id=tokenizer.eos_id,
        )
        texts = [answers(writer, tokenizer, q, settings, args.samples) for q in asked]
        shares = np.array([recalled(q, t) for q, t in zip(asked, texts, strict=True)])
        rows = [row for of_prompt in texts for row in of_prompt]
        every = [word for row in rows for word in row]
        found = dict(zip(("recall", "error"), mean_and_error(shares), strict=True))
        found["distinct_2"] = distinct(rows, 2)
        found["known"] = sum(word in counts for word in every) / max(1, len(every))
        line = f"scale {scale:g}: recall {found['recall']:.3f} +- {found['error']:.3f}"
        if before is not None:
            found["more"], found["more_error"] = mean_and_error(shares - before)
            line += f" ({found['more']:+.3f} +- {found['more_error']:.3f})"
        print(f"{line}, distinct-2 {found['distinct_2']:.3f}, known {found['known']:.3f}",
              flush=True)
        document["scales"][scale] = found
        before = shares
    print(json.dumps(document))


if __name__ == "__main__":
    main()
