"""The quality of samples: repetition, variety, real words, script; never one figure alone."""
from typing import NamedTuple

import numpy as np

EDGE = "0123456789_.,;:!?।॥\"'()[]{}<>“”‘’«»…–—-*/|=+~`^%$#@&\\"


def ngrams(row, n):
    return list(zip(*(row[i:] for i in range(n)), strict=False))


def distinct(rows, n):
    """Different n-grams / all n-grams, over all rows; None if there is none."""
    grams = [g for row in rows for g in ngrams(row, n)]
    return len(set(grams)) / len(grams) if grams else None


def repeat_rate(rows, n=4):
    """Share of n-grams that stood in the same row before: 0 for fresh text, near 1 for a loop."""
    grams = [ngrams(row, n) for row in rows]
    count = sum(map(len, grams))
    return sum(len(g) - len(set(g)) for g in grams) / count if count else 0.0


def unigram_entropy(rows):
    """Entropy in nats of the tokens of all rows together: a judge likes a text of few different
    tokens, this does not.
    """
    counts = np.unique([token for row in rows for token in row], return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum()) if len(p) else None


def words(text):
    """The words of a text without digits and marks at their edges. Python's \\w would cut
    Devanagari at its vowel signs.
    """
    return [bare for word in text.lower().split() if (bare := word.strip(EDGE))]


def quality(texts, script_of, known, judges):
    """[Text] -> every figure at once, as each alone can be won by a bad text. judges: {name:
    f(rows, contexts) -> nats/token}.
    """
    rows, count = [t.row for t in texts], sum(len(t.row) for t in texts)
    contexts = [t.context for t in texts]
    said = [word for t in texts for word in t.new_words()]
    lengths = sorted(len(row) for row in rows)
    return {f"{name}_nats": judge(rows, contexts) for name, judge in judges.items()} | {
        "unigram_entropy": unigram_entropy(rows),
        **{f"distinct_{n}": distinct(rows, n) for n in (1, 2, 3)},
        "repeat_rate": repeat_rate(rows),
        "real_words": sum(map(known.__contains__, said)) / len(said) if said else None,
        "script_kept": sum(script_of(t.prompt) == script_of(t.new) for t in texts) / len(texts),
        "ended": sum(t.ended for t in texts) / len(texts),
        "tokens": count,
        "mean_tokens": count / len(texts),
        "median_tokens": lengths[len(lengths) // 2],
    }


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
        every, old = words(self.prompt + self.new), len(words(self.prompt))
        return every[old:None if self.ended else -1]
