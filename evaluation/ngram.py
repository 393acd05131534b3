"""N-gram models: they score samples and know no network, so a network cannot flatter itself.

    model = NGram(tokens, vocab_size)
    model.nats(rows)                             # mean -log p per token
    shared(ngram_tokens, training_tokens)        # how much of its text the scored model has read:
                                                 # of an independent one nothing

Used by evaluate.py (--samples, --judge_text) and edge_benchmark.py. A low value alone is no praise:
repeating a common phrase scores well too. Read it beside distinct_n and repeat_rate
(sample_quality.py), and beside the value of held-out text.

Interpolated absolute discounting, d = DISCOUNT:
    p_n(w | c) = max(count(c w) - d, 0) / count(c)
                 + d * kinds(c) / count(c) * p_{n-1}(w | c shortened)
Each order is one sorted array of packed n-grams, so 3 million tokens take about 2 seconds and 100
MB.
"""
import math

import numpy as np

DISCOUNT = 0.75
PASSAGE = 13        # tokens: what is as long as that and the same was copied
LONGEST = 4         # tokens of the longest n-gram, as far as 63 bits hold them
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


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
        return rolled(ids, n, np.int64(self.vocab))

    @staticmethod
    def find(keys, values, wanted):
        """The values of the wanted keys, 0 for a key that is not there."""
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
            context = key // self.vocab
            total = self.find(contexts, totals, context)
            seen = total > 0
            divisor = np.where(seen, total, 1)

            own = np.maximum(self.find(keys, counts, key) - DISCOUNT, 0) / divisor
            rest = DISCOUNT * self.find(contexts, kinds, context) / divisor
            lower = p[n - 1:]
            p[n - 1:] = np.where(seen, own + rest * lower, lower)
        return p

    def nats(self, rows, contexts=None):
        """Mean -log p per token of rows, each after its own context (a list of ids); None if there
        is no token.
        """
        if contexts is None:
            contexts = [[]] * len(rows)
        total = 0
        count = 0
        for row, context in zip(rows, contexts, strict=True):
            if len(row):
                p = self.probabilities([*context, *row])[len(context):]
                total -= float(np.log(p).sum())
                count += len(row)
        return total / count if count else None


def rolled(ids, n, factor):
    """Every n-gram of ids as the number whose digits to the base `factor` its ids are."""
    count = max(0, len(ids) - n + 1)
    key = np.zeros(count, dtype=ids.dtype)
    for i in range(n):
        key = key * factor + ids[i:i + count]
    return key


def shared(ids, others, n=PASSAGE):
    """The share of all n-token passages of ids that stand in others, too."""
    # modulo 2^64 the numbers are hashes: two passages agree by chance once in 2^64
    own = rolled(np.asarray(ids).astype(np.uint64), n, HASH_FACTOR)
    if not len(own):
        return 0.0
    theirs = rolled(np.asarray(others).astype(np.uint64), n, HASH_FACTOR)
    return float(np.isin(own, theirs).mean())
