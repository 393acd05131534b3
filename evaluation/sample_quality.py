"""The quality of samples: repetition, variety, real words, script; never one figure alone.

    quality(texts, script_of, known_words, {"ngram": model.nats})        # every figure at once

Used by evaluate.py --samples; edge_benchmark.py and check_run.py use distinct() and repeat_rate().
"""
from typing import NamedTuple

import numpy as np

EDGE = "0123456789_.,;:!?।॥\"'()[]{}<>“”‘’«»…–—-*/|=+~`^%$#@&\\"


class Text(NamedTuple):
    """One continuation, written by a model or by a person."""
    prompt: str
    new: str
    context: list       # ids of the prompt
    row: list           # new ids, EOS included
    ended: bool

    def new_words(self):
        """Words that begin in the new text; the last one only if the text ended there and was not
        cut.
        """
        every = words(self.prompt + self.new)
        if not self.ended:
            every = every[:-1]
        return every[len(words(self.prompt)):]


def words(text):
    """The words of a text without digits and marks at their edges. Python's \\w would cut
    Devanagari at its vowel signs.
    """
    bare = [word.strip(EDGE) for word in text.lower().split()]
    return [word for word in bare if word]


def share(part, whole):
    """part / whole; None of nothing."""
    return part / whole if whole else None


def ngrams(row, n):
    shifted = [row[i:] for i in range(n)]
    return list(zip(*shifted, strict=False))


def distinct(rows, n):
    """Different n-grams / all n-grams, over all rows; None if there is none."""
    grams = []
    for row in rows:
        grams += ngrams(row, n)
    return share(len(set(grams)), len(grams))


def repeat_rate(rows, n=4):
    """Share of n-grams that stood in the same row before: 0 for fresh text, near 1 for a loop."""
    count = 0
    repeated = 0
    for row in rows:
        grams = ngrams(row, n)
        count += len(grams)
        repeated += len(grams) - len(set(grams))
    return share(repeated, count) or 0.0


def unigram_entropy(rows):
    """Entropy in nats of the tokens of all rows together: an n-gram model likes a text of few
    different tokens, this does not.
    """
    tokens = [token for row in rows for token in row]
    if not tokens:
        return None
    counts = np.unique(tokens, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def quality(texts, script_of, known, scorers):
    """[Text] -> every figure at once, as each alone can be won by a bad text.

    known: the real words. scorers: {name: f(rows, contexts) -> nats/token}.
    """
    rows = [text.row for text in texts]
    contexts = [text.context for text in texts]
    figures = {}
    for name, nats in scorers.items():
        figures[f"{name}_nats"] = nats(rows, contexts)
    figures["unigram_entropy"] = unigram_entropy(rows)
    for n in (1, 2, 3):
        figures[f"distinct_{n}"] = distinct(rows, n)
    figures["repeat_rate"] = repeat_rate(rows)

    new_words = []
    for text in texts:
        new_words += text.new_words()
    real = sum(word in known for word in new_words)
    figures["real_words"] = share(real, len(new_words))
    kept = sum(script_of(text.prompt) == script_of(text.new) for text in texts)
    figures["script_kept"] = kept / len(texts)

    figures["ended"] = sum(text.ended for text in texts) / len(texts)
    lengths = sorted(map(len, rows))
    figures["tokens"] = sum(lengths)
    figures["mean_tokens"] = sum(lengths) / len(texts)
    figures["median_tokens"] = lengths[len(lengths) // 2]
    return figures
