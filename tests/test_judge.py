"""The n-gram model is a probability, learns what it saw, prefers real text to noise; repetition is
measured beside it.
"""
import math

import numpy as np
import pytest

from evaluation.ngram import NGram
from evaluation.sample_quality import distinct, repeat_rate

RNG = np.random.default_rng(0)


def markov(n, seed, vocab=20):
    """Text where each token has four likely successors."""
    rng, text = np.random.default_rng(seed), [0]
    for _ in range(n):
        text.append(int((text[-1] * 7 + rng.integers(4)) % vocab))
    return np.array(text)


def test_probabilities_sum_to_one_in_every_context():
    model = NGram(markov(500, 1), 20)
    for context in ([], [3], [1, 7], [1, 7, 2], [19, 19, 19, 19], markov(6, 2).tolist()):
        p = [model.probabilities([*context, w])[-1] for w in range(20)]
        assert sum(p) == pytest.approx(1) and min(p) > 0


def test_it_learns_the_law_and_knows_noise():
    model = NGram(markov(20_000, 1), 20)
    fresh, noise = markov(2000, 9).tolist(), RNG.integers(0, 20, 2000).tolist()
    assert model.nats([fresh]) == pytest.approx(math.log(4), abs=0.05)  # the entropy of the source
    assert model.nats([noise]) > math.log(20)
    assert model.nats([[]]) is None


def test_the_first_order_is_the_unigram_by_hand():
    model = NGram([1, 1, 1, 2], 4)
    assert model.probabilities([1])[0] == pytest.approx((3 - 0.75) / 4 + 0.75 * 2 / 4 / 4)
    assert model.probabilities([3])[0] == pytest.approx(0.75 * 2 / 4 / 4)


def test_a_row_is_scored_after_its_own_context():
    model = NGram(markov(5000, 1), 20)
    text = markov(50, 3).tolist()
    whole = -np.log(model.probabilities(text))
    assert model.nats([text[10:]], [text[:10]]) == pytest.approx(float(whole[10:].mean()))


def test_a_large_vocabulary_shortens_the_grams_and_nothing_overflows():
    model = NGram(RNG.integers(0, 60_000, 3000), 60_000)
    assert model.order == 3
    assert all(keys[0] >= 0 for keys, *_ in model.tables)
    assert np.all(model.probabilities(RNG.integers(0, 60_000, 50)) > 0)


def test_repetition():
    assert repeat_rate([[1, 2, 3, 4] * 5]) > 0.7 and repeat_rate([list(range(30))]) == 0
    assert distinct([[1, 2, 3]], 1) == 1 and distinct([[1, 1, 1, 1]], 2) == 1 / 3
