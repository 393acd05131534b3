"""Independent judges of samples: n-gram models, and the repetition that a judge alone would reward.

    judge = NGram(tokens, vocab_size); judge.nats(rows)        # mean -log p per token
    quality(texts, script_of, known_words, {"ngram": judge.nats})              # all figures of sample quality, never one alone
    shared(judge_tokens, training_tokens)        # how much of its text the judged model has read: of an independent one nothing

Knows no network, so a network cannot flatter itself. A low value alone is no praise: repeating a common phrase scores well
too. Read it beside distinct_n and repeat_rate, and beside the value of held-out text. Interpolated absolute discounting:
    p_n(w | c) = max(count(c w) - d, 0) / count(c)  +  d * kinds(c) / count(c) * p_{n-1}(w | c shortened)
Each order is one sorted array of packed n-grams, so 3 million tokens take about 2 seconds and 100 MB.
"""
import math
from typing import NamedTuple

import numpy as np

EDGE = "0123456789_.,;:!?।॥\"'()[]{}<>“”‘’«»…–—-*/|=+~`^%$#@&\\"
DISCOUNT = 0.75
PASSAGE = 13        # tokens: what is as long as that and the same was copied
LONGEST = 4         # words of the longest n-gram, as far as 63 bits hold them


class NGram:
    def __init__(self, tokens, vocab_size):
        self.vocab = int(vocab_size)
        self.order = min(LONGEST, int(63 // math.log2(self.vocab + 1)))
        ids = np.asarray(tokens).astype(np.int64)
        self.tables = []                    # per order: sorted keys, their counts; sorted contexts, their totals, their kinds
        for n in range(1, self.order + 1):
            keys, counts = np.unique(self.pack(ids, n), return_counts=True)
            contexts, first = np.unique(keys // self.vocab, return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(keys)))
            self.tables.append((keys, counts, contexts, totals, kinds))

    def pack(self, ids, n):
        """Every n-gram of ids as one integer."""
        key = np.zeros(max(0, len(ids) - n + 1), dtype=np.int64)
        for i in range(n):
            key = key * self.vocab + ids[i:len(ids) - n + 1 + i]
        return key

    @staticmethod
    def find(keys, values, wanted):
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    def probabilities(self, ids):
        """p of each token given those before it in the same text."""
        ids = np.asarray(ids, dtype=np.int64)
        p = np.full(len(ids), 1 / self.vocab)
        for n, (keys, counts, contexts, totals, kinds) in enumerate(self.tables, 1):
            if len(ids) < n:
                break
            key = self.pack(ids, n)
            total = self.find(contexts, totals, key // self.vocab)
            seen, lower = total > 0, p[n - 1:]
            safe = np.where(seen, total, 1)
            own = np.maximum(self.find(keys, counts, key) - DISCOUNT, 0) / safe
            rest = DISCOUNT * self.find(contexts, kinds, key // self.vocab) / safe
            p[n - 1:] = np.where(seen, own + rest * lower, lower)
        return p

    def nats(self, rows, contexts=None):
        """Mean -log p per token of rows, each after its own context (a list of ids); None if there is no token."""
        total = count = 0
        for row, context in zip(rows, contexts or [[]] * len(rows), strict=True):
            if len(row):
                total -= float(np.log(self.probabilities([*context, *row])[len(context):]).sum())
                count += len(row)
        return total / count if count else None


def shared(ids, others, n=PASSAGE):
    """The share of all n-token passages of ids that stand in others, too."""
    def marks(ids):
        ids = np.asarray(ids).astype(np.uint64)
        key = np.zeros(max(0, len(ids) - n + 1), dtype=np.uint64)
        for i in range(n):                  # a hash: two passages in 2^64 agree by chance
            key = key * np.uint64(0x9E3779B97F4A7C15) + ids[i:len(ids) - n + 1 + i]
        return key
    own = marks(ids)
    return float(np.isin(own, marks(others)).mean()) if len(own) else 0.0


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
    """Entropy in nats of the tokens of all rows together: a judge likes a text of few different tokens, this does not."""
    counts = np.unique([token for row in rows for token in row], return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum()) if len(p) else None


def words(text):
    """The words of a text without digits and marks at their edges. Python's \\w would cut Devanagari at its vowel signs."""
    return [bare for word in text.lower().split() if (bare := word.strip(EDGE))]


def quality(texts, script_of, known, judges):
    """[Text] -> every figure at once, as each alone can be won by a bad text. judges: {name: f(rows, contexts) -> nats/token}."""
    rows, count = [t.row for t in texts], sum(len(t.row) for t in texts)
    contexts = [t.context for t in texts]
    said = [word for t in texts for word in t.new_words()]
    lengths = sorted(len(row) for row in rows)
    return {f"{name}_nats": judge(rows, contexts) for name, judge in judges.items()} | {
        "unigram_entropy": unigram_entropy(rows), **{f"distinct_{n}": distinct(rows, n) for n in (1, 2, 3)},
        "repeat_rate": repeat_rate(rows), "real_words": sum(map(known.__contains__, said)) / len(said) if said else None,
        "script_kept": sum(script_of(t.prompt) == script_of(t.new) for t in texts) / len(texts),
        "ended": sum(t.ended for t in texts) / len(texts), "tokens": count, "mean_tokens": count / len(texts),
        "median_tokens": lengths[len(lengths) // 2]}


class Text(NamedTuple):
    """One continuation, written by a model or by a person."""
    prompt: str
    new: str
    context: list       # ids of the prompt
    row: list           # new ids, EOS included
    ended: bool

    def new_words(self):
        """Words that begin in the new text; the last one only if the text ended there and was not cut."""
        every, old = words(self.prompt + self.new), len(words(self.prompt))
        return every[old:None if self.ended else -1]
