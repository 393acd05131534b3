"""Independent judges of samples: n-gram models, and the repetition that a judge alone would reward.

    judge = NGram(tokens, vocab_size); judge.nats(rows)        # mean -log p per token
    quality(texts, script_of, known_words, {"ngram": judge.nats})              # all figures of
        sample quality, never one alone
    shared(judge_tokens, training_tokens)        # how much of its text the judged model has read:
        of an independent one nothing

Knows no network, so a network cannot flatter itself. A low value alone is no praise: repeating a
common phrase scores well too. Read it beside distinct_n and repeat_rate, and beside the value of
held-out text. Interpolated absolute discounting:
    p_n(w | c) = max(count(c w) - d, 0) / count(c)  +  d * kinds(c) / count(c) * p_{n-1}(w | c
        shortened)
Each order is one sorted array of packed n-grams, so 3 million tokens take about 2 seconds and 100
MB.
"""
import math

import numpy as np

DISCOUNT = 0.75
PASSAGE = 13        # tokens: what is as long as that and the same was copied
LONGEST = 4         # words of the longest n-gram, as far as 63 bits hold them


class NGram:
    def __init__(self, tokens, vocab_size):
        self.vocab = int(vocab_size)
        self.order = min(LONGEST, int(63 // math.log2(self.vocab + 1)))
        ids = np.asarray(tokens).astype(np.int64)
        # per order: sorted keys, their counts; sorted contexts, their totals, their kinds
        self.tables = []
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
        """Mean -log p per token of rows, each after its own context (a list of ids); None if there
        is no token.
        """
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

