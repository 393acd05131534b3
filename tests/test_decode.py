"""The promises of the decode loop, on a fake denoiser with the worst habits, and cached against
uncached text on real nets.
"""
import dataclasses
import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TINIER, tiny_model

from attention import KVCache
from common.console import UserError
from sampling import decode, unmasking
from sampling.decode import generate, infill
from sampling.settings import ADAPTIVE, MODES, Settings
from sampling.torch_model import TorchModel
from sampling.unmasking import LOOKING, NAMES, Look, distribution, reveal_count

V, EOS = 17, 3
MASK = V


def write(net, *args):
    """generate with a PyTorch model."""
    return generate(TorchModel(net), *args)


def randn(*shape):
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


class FakeCache:
    """What was read, the start in front."""
    nbytes = 0

    def __init__(self, batch, mask):
        self.text = np.full((batch, 1), mask)

    @property
    def length(self):
        return self.text.shape[1]

    def select(self, rows):
        self.text = self.text[rows]


class Fake:
    """Random but repeatable logits, which depend on all text before and in the block; habit:
    mask_lover, all_eos, no_eos, nan, constant.
    """

    def __init__(self, habit="plain", vocab=V):
        self.cfg = SimpleNamespace(
            mask_id=vocab, pad_id=0, vocab_size=vocab, n_layers=4, causal=False
        )
        self.habit, self.vocab = habit, vocab
        self.states_calls, self.head_rows, self.steps, self.depths = 0, [], [], []
        self.caches = []

    def of_text(self, ids, last):
        """States at the last so many positions."""
        return np.eye(self.vocab + 1)[ids].cumsum(1)[:, -last:]

    def states(self, xt, cache, depth=None):
        self.states_calls += 1
        self.depths.append(depth or self.cfg.n_layers)
        return self.of_text(np.concatenate((cache.text[:, 1:], xt), axis=1), xt.shape[1])

    def logits(self, states, rows, positions):
        self.head_rows.append(len(rows))
        return self.scores(states[rows, positions])

    def scores(self, h):
        """The logits of states (N, D)."""
        generator = np.random.default_rng(int(h.sum()) % 1000)
        z = generator.standard_normal((len(h), self.vocab + 1), dtype=np.float32)
        if self.habit == "mask_lover":
            z[..., [0, self.vocab]] = 50.0
        if self.habit == "all_eos":
            z[..., EOS] = 50.0
        if self.habit == "no_eos":
            z[..., EOS] = -50.0
        if self.habit == "constant":
            z[:] = 0.0
        if self.habit == "nan":
            z[0, 1] = float("nan")
        z[..., [0, self.vocab]] = -float("inf")  # the protocol: never an answer
        return z

    def new_cache(self, batch, length):
        self.caches.append(FakeCache(batch, self.vocab))
        return self.caches[-1]

    def step(self, x0, cache):
        assert x0.size and (x0 != self.vocab).all(), "a mask was read as clean text"
        assert len(x0) == len(cache.text)
        self.steps.append(tuple(x0.shape))
        cache.text = np.concatenate((cache.text, x0), axis=1)
        return self.of_text(cache.text[:, 1:], x0.shape[1])


class InOnePass(Fake):
    """It has step_and_states, too."""

    def step_and_states(self, x0, xt, cache):
        self.step(x0, cache)
        return self.states(xt, cache)


def blocks_of(s):
    size = s.max_new_tokens if s.mode == "full" else s.block_size
    return [min(size, s.max_new_tokens - a) for a in range(0, s.max_new_tokens, size)]


def random_settings(rnd, longest, **more):
    return Settings(
        max_new_tokens=rnd.randint(1, longest),
        steps=rnd.randint(1, longest + 20),
        mode=rnd.choice(MODES),
        block_size=rnd.choice([1, 2, rnd.randint(1, 64)]),
        sampler=rnd.choice(NAMES),
        reveal=rnd.choice(["linear", "cosine"]),
        threshold=rnd.choice([0.0, 0.3, 0.9, 1.0]),
        alg_temp=rnd.choice([0.0, 0.5]),
        temperature=rnd.choice([0, 1e-6, 0.7, 1.0, 10.0]),
        temperature_end=rnd.choice([None, 0.0, 0.5]),
        top_k=rnd.choice([0, 1, 5, 99]),
        top_p=rnd.choice([1.0, 0.9, 0.1]),
        repetition_penalty=rnd.choice([1.0, 1.5]),
        remask=rnd.choice([0.0, 0.0, 0.3]),
        remask_rule=rnd.choice(["cap", "rescale", "conf"]),
        min_depth=rnd.choice([0, 0, 2]),
        eos_id=rnd.choice([EOS, None]),
        **more,
    )


def check_case(rnd, longest):
    habit = rnd.choice(["plain", "mask_lover", "all_eos", "no_eos", "constant"])
    vocab = rnd.choice([V, V, 5])  # 5: pad, three specials and one real token
    s = random_settings(rnd, longest, guidance_scale=rnd.choice([1.0, 1.0, 2.0]))
    if s.sampler in ADAPTIVE:
        s.remask = 0.0
    B = rnd.randint(1, 3)
    prompts = [
        [2, *(rnd.randint(4, vocab - 1) for _ in range(rnd.randint(0, 12)))] for _ in range(B)
    ]
    if rnd.random() < 0.5:
        prompts = [prompts[0]] * B
    net = rnd.choice([Fake, InOnePass])(habit, vocab)
    out = generate(net, prompts, s, [rnd.randrange(10 ** 6) for _ in range(B)])
    # a rule with a schedule of its own keeps it, however few the masks
    own_schedule = s.remask or s.sampler == "ancestral"
    most = sum(s.steps if own_schedule else min(s.steps, n) for n in blocks_of(s))
    sides = 2 if s.guidance_scale != 1 and s.mode == "block_frozen" else 1
    if s.left_to_right:
        most = s.max_new_tokens
        sides = 0
    lengths = {len(p) for p in prompts}
    assert net.states_calls == out.forwards * sides and out.forwards <= most * len(lengths)
    check_caches(net, s, prompts, out)
    assert max(out.row_forwards) <= most
    for row, full in zip(out.rows, out.full_rows, strict=True):
        assert all(0 < token < vocab for token in full) and row == full[:len(row)]
        assert len(full) == s.max_new_tokens or s.eos_id is not None and EOS in full
        assert EOS not in row or s.eos_id is None
    if habit == "no_eos" and vocab > 5 or s.eos_id is None:
        assert all(len(row) == s.max_new_tokens for row in out.rows)


def check_caches(net, s, prompts, out):
    """The context of each group: every token before the last block, once, and no other."""
    read = [cache.text[:, 1:] for cache in net.caches if cache.length > 1]
    if s.mode != "block_frozen":
        assert not read and not net.steps
        return
    groups = sorted({len(p) for p in prompts})
    for text, P in zip(read, groups, strict=True):
        texts = [
            p + row for p, row in zip(prompts, out.full_rows, strict=True) if len(p) == P
        ]
        longest = max(map(len, texts)) - P
        last = P + (longest - 1) // s.block_size * s.block_size  # where the last block begins
        assert text.shape[1] == last
        assert all(row in [ids[:last] for ids in texts] for row in text.tolist())


@pytest.mark.parametrize("part", range(10))
def test_guarantees_on_random_cases(part):
    """Ends within the stated forwards, no mask left, no pad, prompt untouched (generate asserts
    it), the context read once, for any length, block, steps, sampler, temperature, remasking,
    guidance, depth, and batches of unequal prompts and progress. A quarter of the ten thousand
    cases of tests/stress/decode.py.
    """
    check_cases(part, 250)


def check_cases(part, cases):
    rnd = random.Random(part)
    for case in range(cases):
        check_case(rnd, 130 if case % 200 == 0 else 8)


def test_twelve_steps_are_twelve_forwards_of_at_most_six():
    net = Fake("no_eos")
    out = generate(net, [2, 5], Settings(64, 12), [0])
    assert out.forwards == net.states_calls == 12
    revealed = [a - b for a, b in zip(net.head_rows, [*net.head_rows[1:], 0], strict=True)]
    assert sum(revealed) == 64 and max(revealed) <= 6 and min(revealed) >= 5
    assert net.head_rows[0] == 64  # the head sees masked positions only


@pytest.mark.parametrize("rule", ["linear", "cosine"])
def test_reveal_schedule_adds_up(rule):
    for masked in range(1, 70):
        for steps in range(1, 20):
            left, shares = masked, []
            for step in range(steps):
                if left:
                    shares.append(reveal_count(left, step, steps, rule))
                    assert 1 <= shares[-1] <= left
                    left -= shares[-1]
            assert left == 0
            if rule == "linear":
                assert max(shares) - min(shares) <= 1 or min(shares) == 1
    first, last = reveal_count(64, 0, 8, "cosine"), reveal_count(64, 0, 8, "linear")
    assert first < last  # cosine is careful at first


@pytest.mark.parametrize("rule, part", [("linear", 4), ("cosine", 2)])
def test_a_row_is_never_behind_its_schedule_and_ahead_by_a_part_of_the_steps(rule, part):
    for masked in range(1, 80):
        for steps in range(1, masked + 1):
            left = masked
            for step in range(steps):
                left -= reveal_count(left, step, steps, rule) if left else 0
                ahead = masked * unmasking.masked_share(step + 1, steps, rule) - left
                assert -1e-9 <= ahead <= steps / part + 1e-9


def test_ancestral_keeps_its_steps_and_runs_no_empty_forward():
    """Many more steps than masks: one token at a time, nearly always, and no more forwards than
    tokens.
    """
    net = Fake("no_eos")
    out = generate(net, [2], Settings(20, 5000, sampler="ancestral", eos_id=None), [0, 1, 2])
    assert all(18 <= forwards <= 20 for forwards in out.row_forwards)
    assert len(net.head_rows) == out.forwards and min(net.head_rows) >= 1


def test_nan_is_an_error_and_not_an_answer():
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(Fake("nan"), [2], Settings(8, 4), [0])


class Bad(Fake):
    """One logit is not a number, at the `nth` call of the head."""

    def __init__(self, value, nth=1):
        super().__init__()
        self.value, self.nth, self.calls = value, nth, 0

    def scores(self, h):
        z, self.calls = super().scores(h), self.calls + 1
        if self.calls == self.nth:
            z[0, 5] = self.value
        return z


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_answer_comes_from_logits_that_are_not_finite(value, nth, temperature):
    """On both sides of the guidance, in a continuation and in a gap; as a message, not as a
    traceback.
    """
    s = Settings(8, 4, temperature=temperature, guidance_scale=2.0)
    for write in (
        lambda: generate(Bad(value, nth), [2, 5], s, [0]),
        lambda: infill(Bad(value, nth), [2, V, V, 5], s, [0]),
    ):
        with pytest.raises(UserError, match="NaN or infinity"):
            write()
    with pytest.raises(UserError, match="NaN or infinity"):
        infill(Bad(value), [2, V, V, 5], Settings(8, 4, temperature=temperature), [0])


def test_a_guidance_that_overflows_is_refused():
    with pytest.raises(UserError, match="--guidance_scale 1e.308 is too large"):
        generate(RowWise(), [2, 5], Settings(8, 4, guidance_scale=1e308), [0])


EXTREMES = [
    ("temperature", 1e-310),
    ("temperature", 5e-324),
    ("temperature", 1e308),
    ("alg_temp", 1e-310),
    ("alg_temp", 1e308),
    ("top_p", 1e-310),
    ("repetition_penalty", 1e-300),
    ("repetition_penalty", 1e300),
    ("repetition_penalty", 5e-324),
]


@pytest.mark.parametrize("sampler", LOOKING)
@pytest.mark.parametrize("name, value", EXTREMES)
def test_extreme_numbers_still_decode(sampler, name, value):
    for habit in ("plain", "constant"):
        out = generate(
            Fake(habit), [2, 5, 6], Settings(12, 6, sampler=sampler, **{name: value}), [0]
        )
        assert all(0 < token < V for token in out.rows[0]) and len(out.rows[0]) == 12


def test_the_lowest_temperature_is_greedy():
    """And the lowest noise on the choice of positions is none."""
    z = randn(50, V + 1)
    assert distribution(z, 5e-324, 0, 1.0).argmax(-1).tolist() == z.argmax(-1).tolist()
    # equals stay equal
    assert distribution(np.zeros((1, 4)), 1e-310, 0, 1.0).tolist() == [[0.25] * 4]
    look, g = Look(z), np.random.default_rng(2)
    plain, noisy = (
        unmasking.confidence(look, 50, Settings(50, 50, alg_temp=t), g).tolist()
        for t in (0.0, 1e-310)
    )
    assert plain == noisy


def test_more_tokens_than_the_machine_can_hold_are_refused():
    for mode in MODES:
        for tokens in (10 ** 14, 10 ** 30):
            with pytest.raises(UserError, match=f"--max_new_tokens {tokens}.*memory"):
                generate(Fake(), [2, 5], Settings(tokens, 4, mode=mode), [0])


class RowWise(Fake):
    """Logits depend on the row's own text only."""

    def scores(self, h):
        z = 2 * np.sin(h @ np.arange(1.0, (V + 1) ** 2 + 1).reshape(V + 1, V + 1) * 0.37)
        z[..., [0, V]] = -float("inf")
        return z.astype(np.float32)


@pytest.mark.parametrize("mode, size", [("block", 7), ("block_frozen", 7), ("block_frozen", 1)])
@pytest.mark.parametrize("sampler", NAMES)
def test_same_seed_same_text_whatever_the_batch(sampler, mode, size):
    """Neighbours of other lengths, other seeds and other progress change nothing."""
    for remask in (0.0, 0.3) if sampler not in ADAPTIVE else (0.0,):
        for eos in (None, EOS):
            s = Settings(
                20,
                12,
                mode=mode,
                block_size=size,
                sampler=sampler,
                eos_id=eos,
                remask=remask,
                threshold=0.2,
                alg_temp=0.3,
            )
            prompts, seeds = [[2, 6, 8], [2, 6, 8], [2, 9], [2, 5, 5, 5, 7]], [11, 12, 13, 11]
            batch = generate(RowWise(), prompts, s, seeds).rows
            assert [
                generate(RowWise(), p, s, [seed]).rows[0]
                for p, seed in zip(prompts, seeds, strict=True)
            ] == batch
            assert len({tuple(row) for row in batch}) == 4


def test_eos_stops_only_when_nothing_before_it_is_masked():
    """A net that says EOS late first: the text before it must be completed; one that says EOS
    everywhere stops at once.
    """
    class LateEos(Fake):
        def states(self, xt, cache, depth=None):
            self.states_calls += 1
            return np.tile(np.arange(xt.shape[1]), (len(xt), 1))[..., None]

        def scores(self, h):
            z = np.zeros((len(h), V + 1))
            at = h[:, 0]
            z[at < 9, 7] = 3 + at[at < 9] * 0.1  # later ones are surer
            z[at >= 9, EOS] = 50.0
            z[..., [0, V]] = -float("inf")
            return z
    out = generate(LateEos(), [2], Settings(20, 20, temperature=0, eos_id=EOS), [0])
    assert out.rows == [[7] * 8] and out.full_rows == [[7] * 8 + [EOS]]
    out = generate(
        Fake("all_eos"),
        [2],
        Settings(64, 64, mode="block", block_size=16, temperature=0, eos_id=EOS),
        [0],
    )
    assert out.rows == [[]] and out.forwards <= 16


def test_frozen_mode_passes():
    """Two blocks: one context pass for the prompt, one for the finished block that has a successor,
    none for the last.
    """
    net = Fake("no_eos")
    out = generate(
        net, [2, 5, 6], Settings(128, 6, mode="block_frozen", block_size=64, eos_id=EOS), [0]
    )
    assert (out.forwards, out.context_passes) == (12, 2)
    assert net.steps == [(1, 3), (1, 64)]
    net = InOnePass("no_eos")
    out = generate(
        net, [2, 5, 6], Settings(128, 6, mode="block_frozen", block_size=64, eos_id=EOS), [0]
    )
    # the finished block is read beside the first forward of the next one
    assert (out.forwards, out.context_passes) == (12, 1) and net.steps == [(1, 3), (1, 64)]
    # one token at a time: the prompt but its last token, then one row a token
    net = InOnePass("no_eos")
    s = Settings(5, 6, mode="block_frozen", block_size=1, eos_id=EOS)
    out = generate(net, [2, 5, 6], s, [0])
    assert (out.forwards, out.context_passes, net.states_calls) == (5, 1, 0)
    assert net.steps == [(1, 2)] + [(1, 1)] * 5
    net = InOnePass("no_eos")
    out = generate(net, [2], s, [0])
    assert (out.forwards, out.context_passes) == (5, 0) and net.steps == [(1, 1)] * 5


def test_confidence_ignores_a_constant_added_to_a_position():
    z = randn(6, V + 1)
    shifted = z + np.array([0.0, 100.0, -50.0, 3.0, 0.0, 9.0])[:, None]
    chosen = [unmasking.confidence(Look(each), 4, Settings(6, 6), None) for each in (z, shifted)]
    assert np.array_equal(*chosen) and len(chosen[0]) == 4


def looked(*sure):
    """A Look whose best tokens have these probabilities, the rest split evenly over nine others."""
    p = np.array(sure)[:, None]
    with np.errstate(divide="ignore"):
        return Look(np.log(np.concatenate((p, np.repeat((1 - p) / 9, 9, axis=1)), axis=1)))


def test_a_look_is_the_softmax():
    """Against PyTorch's, also where an answer is impossible or the logits are large."""
    z = 5 * randn(40, V + 1) + 3000
    z[:, [0, V]] = -np.inf
    look, p = Look(z), torch.from_numpy(z).double().softmax(-1)
    best = p.topk(2, dim=-1).values
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    tokens = p.argmax(-1)[3:9]
    for mine, theirs in (
        (look.sure, best[:, 0]),
        (look.margin, best[:, 0] - best[:, 1]),
        (look.entropy, entropy),
        (look.chance(slice(3, 9), tokens.numpy()), best[3:9, 0]),
        (np.exp(unmasking.log_softmax(z)), p),
    ):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_adaptive_rules_by_hand():
    look = looked(0.5, 0.95, 0.2, 0.92, 0.91)
    s, g = Settings(5, 5, threshold=0.9), None
    assert unmasking.threshold(look, 1, s, g).tolist() == [1, 3, 4]
    assert unmasking.threshold(looked(0.1, 0.3), 1, s, g).tolist() == [1]  # never nothing
    # factor, 1 - 0.8 = 0.2: n = 1: 2 * 0.05 fits; n = 2: 3 * 0.08 = 0.24 does not, nor do more
    assert unmasking.factor(look, 1, Settings(5, 5, threshold=0.8), g).tolist() == [1]
    assert unmasking.factor(look, 1, Settings(5, 5, threshold=0.7), g).tolist() == [1, 3]
    h = look.entropy.tolist()
    budget = h[1] + h[3]  # the two surest are free beside the third
    assert unmasking.entropy(look, 1, Settings(5, 5, threshold=1 - budget - 1e-4), g).tolist() == [
        1, 3, 4,
    ]
    assert unmasking.entropy(look, 1, Settings(5, 5, threshold=1.0), g).tolist() == [1]
    assert unmasking.margin(look, 2, s, g).tolist() == [1, 3]
    certain = looked(1.0, 1.0, 1.0)
    # 0 * -inf is not a number
    assert all(len(LOOKING[name](certain, 1, s, g)) == 3 for name in ADAPTIVE)


def test_alg_temp_moves_the_choice_from_the_surest_to_any():
    look, g = looked(0.9, 0.5, 0.3, 0.2), np.random.default_rng(0)
    firsts = [
        [int(unmasking.confidence(look, 1, Settings(4, 4, alg_temp=t), g)[0]) for _ in range(400)]
        for t in (0.0, 1.0, 1e6)
    ]
    assert set(firsts[0]) == {0}
    # chances as the confidences
    assert firsts[1].count(0) / 400 == pytest.approx(0.9 / 1.9, abs=0.09)
    assert firsts[2].count(0) / 400 == pytest.approx(0.25, abs=0.09)


def test_repetition_penalty_divides_and_multiplies():
    z = np.array([[2.0, -2.0, 1.0, -np.inf]])
    assert unmasking.discourage(z, np.array([0, 1, 3]), 2.0).tolist() == [
        [1.0, -4.0, 1.0, -float("inf")]
    ]


JOINT = np.random.default_rng(5).random((3, 3, 3)) ** 3
JOINT /= JOINT.sum()  # p(x1, x2, x3) over three real tokens


def conditional(ids):
    """Exact p(x_i | what is revealed) of the toy joint for one row of ids (0, 1, 2 or None) -> (3,
    3).
    """
    p = JOINT.copy()
    for axis, token in enumerate(ids):
        if token is not None:
            keep = np.zeros(3)
            keep[token] = 1
            p *= keep.reshape([3 if a == axis else 1 for a in range(3)])
    p /= p.sum()
    return np.stack([p.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)])


class Oracle(Fake):
    """A perfect denoiser of the toy joint; real tokens are 4, 5, 6."""

    def states(self, xt, cache, depth=None):
        self.states_calls += 1
        known = {}
        out = []
        for row in xt[:, -3:].tolist():
            key = tuple(None if t == 7 else t - 4 for t in row)
            if key not in known:
                known[key] = conditional(key)
            out.append(known[key])
        h = np.stack(out)
        return np.concatenate((np.zeros((len(h), xt.shape[1] - 3, 3)), h), axis=1)

    def scores(self, h):
        z = np.full((len(h), 8), -np.inf)
        z[:, 4:7] = np.log(h)
        return z


def enumerated(steps, sets_at):
    """Exact law of the text when at each step a set of positions is revealed: sets_at(masked, step)
    -> [(chance, set)].
    """
    law = np.zeros((3, 3, 3))

    def go(ids, step, chance):
        masked = [i for i, t in enumerate(ids) if t is None]
        if not masked:
            law[tuple(ids)] += chance
            return
        p = conditional(ids)
        for weight, chosen in sets_at(masked, step):
            if not weight:
                continue
            for tokens in itertools.product(range(3), repeat=len(chosen)):
                new, q = list(ids), chance * weight
                for i, t in zip(chosen, tokens, strict=True):
                    new[i], q = t, q * float(p[i, t])
                go(new, step + 1, q)
    go([None] * 3, 0, 1.0)
    return law


def subsets(masked, stay):
    for n in range(len(masked) + 1):
        for chosen in itertools.combinations(masked, n):
            yield (1 - stay) ** n * stay ** (len(masked) - n), chosen


@pytest.mark.parametrize(
    "sampler, steps", [("random", 3), ("random", 2), ("ancestral", 2), ("ancestral", 3)]
)
def test_exact_law_on_a_toy_joint(sampler, steps):
    """Texts of a perfect denoiser follow the law that enumeration gives; one random position at a
    time: the joint itself.
    """
    def sets_at(masked, step):
        if sampler == "ancestral":
            return subsets(masked, 1 - 1 / (steps - step))
        chosen = list(
            itertools.combinations(masked, reveal_count(len(masked), step, steps, "linear"))
        )
        return [(1 / len(chosen), c) for c in chosen]
    law = enumerated(steps, sets_at)
    assert float(law.sum()) == pytest.approx(1)
    if (sampler, steps) == ("random", 3):
        np.testing.assert_allclose(law, JOINT, rtol=1e-7)
    n = 6000
    out = generate(
        Oracle(vocab=7), [2], Settings(3, steps, sampler=sampler, eos_id=None), list(range(n))
    )
    seen = np.zeros((3, 3, 3))
    for row in out.rows:
        seen[tuple(t - 4 for t in row)] += 1
    chi2 = float(((seen - n * law) ** 2 / (n * law)).sum())
    assert chi2 < 26 + 5 * 52 ** 0.5, chi2  # 26 degrees of freedom, five deviations
    if (sampler, steps) == ("ancestral", 2):  # the test can tell: the joint is another law
        assert float(((seen - n * JOINT) ** 2 / (n * JOINT)).sum()) > 150


@pytest.mark.parametrize("rule", ["cap", "rescale", "conf"])
@pytest.mark.parametrize("sampler", ["confidence", "random"])
def test_remasking_keeps_the_schedule_and_really_happens(sampler, rule):
    masked, went_back, before = [], 0, None

    def look(canvas, lo, hi, step):
        nonlocal before, went_back
        now = canvas.ids[0, lo:hi] == MASK
        masked.append(int(now.sum()))
        went_back += 0 if before is None else int((now & ~before).sum())
        before = now

    generate(
        Fake("no_eos"),
        [2],
        Settings(32, 64, sampler=sampler, remask=0.2, remask_rule=rule, eos_id=None),
        [1],
        look,
    )
    # the last half token rounds to none
    assert masked == [round(32 * (1 - (i + 1) / 64)) for i in range(63)]
    assert went_back > 5


def test_depth_grows_from_the_least_to_all_and_ends_with_all():
    for least, want in (
        (1, [1, 2, 3, 4, 4] * 2),
        (3, [3, 4, 4, 4, 4] * 2),
        (0, [4] * 10),
        (4, [4] * 10),
    ):
        net = Fake("no_eos")
        out = generate(
            net,
            [2],
            Settings(20, 5, mode="block", block_size=10, min_depth=least, eos_id=None),
            [0],
        )
        assert net.depths == want and out.layer_passes == sum(want)


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_full_depth_is_bit_for_bit_no_early_exit(model):
    net = small(model, exits=True)
    off, all_layers, early = (
        write(
            net,
            [2, 6],
            Settings(
                24, 4, mode="block_frozen", block_size=8, temperature=0, eos_id=None, min_depth=d
            ),
            [0],
        )
        for d in (0, 2, 1)
    )
    assert (
        off.rows == all_layers.rows
        and off.layer_passes == all_layers.layer_passes > early.layer_passes
    )
    xt, cache = torch.tensor([[2, 40, 40, 7]]), net.new_cache(1, 0)
    full, early = net.states(xt, cache, 2), net.states(xt, cache, 1)
    assert torch.equal(net.states(xt, cache), full) and not torch.equal(full, early)


def small(model, seed=3, exits=False, vocab=40):
    return tiny_model(model, vocab, seed=seed, away=0.2, exits=exits, conv_kernel=7)


def lifted(c, guided):
    """Only tokens that are a tenth as likely as the best by log-probabilities c may gain."""
    possible = c >= c.amax(-1, keepdim=True) + math.log(0.1)
    return torch.where(possible, guided, torch.minimum(guided, c))


def test_guidance_prefers_no_token_that_the_prompt_makes_unlikely():
    """Of a token that is rare with the prompt, and rarer without, the formula would make the only
    answer: it may be at most as frequent as without guidance.
    """
    class Prompted:
        """Without the prompt, 4 is less likely, and 6 hardly possible."""
        class cfg:
            mask_id, pad_id, vocab_size, n_layers, causal = 7, 0, 8, 1, False

        def states(self, ids, cache, depth=None):
            return ids

        def logits(self, states, rows, positions):
            given = np.array([0, 0, 0, 0, 0.50, 0.48, 0.02, 0], np.float32)
            bare = np.array([0, 0, 0, 0, 0.30, 0.6999, 0.0001, 0], np.float32)
            without = states[rows, 1] == self.cfg.mask_id
            with np.errstate(divide="ignore"):
                return np.log(np.where(without[:, None], bare, given))

        def new_cache(self, rows, length):
            return None

    def shares(scale):
        settings = Settings(400, 1, mode="full", temperature=1.0, eos_id=None, guidance_scale=scale)
        [row] = generate(Prompted(), [2, 4, 4], settings, [0]).rows
        return [row.count(token) / 400 for token in (4, 5, 6)]

    assert shares(1)[2] > 0.01 and shares(0)[1] > 0.6
    common, other, rare = shares(4)
    assert rare < 0.03 and common > 0.85 > other > 0


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("mode", MODES)
def test_guidance_is_the_formula(model, mode):
    """u + s (c - u) on log-probabilities, both sides of the same network, which lifts no token that
    is not a tenth as likely as the best one; the greedy first choice shows it.
    """
    net, prompt = small(model, seed=4), [2, 7, 9, 11, 5]
    plain = Settings(8, 1, mode=mode, block_size=8, temperature=0, eos_id=None)
    guided = dataclasses.replace(plain, guidance_scale=3.0)
    block = torch.full((1, 8), 40)
    with torch.no_grad():
        if mode == "block_frozen":
            cache = net.new_cache(1, 13)
            net.step(torch.tensor([prompt]), cache)
            c, u = net(block, cache), net(block)
        else:
            c = net(torch.cat((torch.tensor([prompt]), block), dim=1))[:, 5:]
            u = net(torch.cat((torch.tensor([[2, 40, 40, 40, 40]]), block), dim=1))[:, 5:]
        c, u = c.log_softmax(-1), u.log_softmax(-1)
    want = lifted(c, u + 3 * (c - u)).nan_to_num(-math.inf).argmax(-1).tolist()
    assert write(net, prompt, guided, [0]).rows == want
    assert want != c.argmax(-1).tolist()


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_infilling_fills_every_gap_and_nothing_else(model):
    writer, rnd = TorchModel(small(model)), random.Random(1)
    for sampler in NAMES:
        ids = [2] + [rnd.choice([40, rnd.randint(4, 39)]) for _ in range(30)]
        out = infill(writer, ids, Settings(0, 5, sampler=sampler, eos_id=None), [3, 4])
        for row in out.rows:
            assert all(
                0 < new < 40 and (old == 40 or new == old)
                for old, new in zip(ids, row, strict=True)
            )
        assert out.forwards <= 5
    assert infill(writer, [2, 5, 6], Settings(0, 5), [0]).forwards == 0


def test_an_eos_in_a_gap_ends_nothing():
    """The text behind the gap is given, so every gap is filled, whatever Settings.eos_id says."""
    ids = [2, V, V, 5, V, V, V, 6]
    [row] = infill(Fake("all_eos"), ids, Settings(0, 3, temperature=0, eos_id=EOS), [0]).rows
    assert row == [2, EOS, EOS, 5, EOS, EOS, EOS, 6]


def test_ten_thousand_tokens_in_constant_memory():
    net = small("primary")
    short, long = (
        write(net, [2], Settings(n, 1, mode="block_frozen", block_size=64, eos_id=None), [0])
        for n in (64, 10_000)
    )
    assert len(long.rows[0]) == 10_000 and long.cache_bytes == short.cache_bytes
    assert long.rows[0][:64] == short.rows[0]


@pytest.mark.parametrize("size, same", [(16, 64), (1, 62)])
def test_the_transformers_cache_slides(size, same):
    net = small("backup", seed=4)
    free, tight = (
        Settings(160, 2, mode="block_frozen", block_size=size, temperature=0, eos_id=None, window=w)
        for w in (None, 64)
    )
    a, b = write(net, [2, 5, 6], free, [0]), write(net, [2, 5, 6], tight, [0])
    assert len(b.rows[0]) == 160 and b.cache_bytes == net.new_cache(1, 64).nbytes < a.cache_bytes
    # the same until text has left the window
    assert a.rows[0][:same] == b.rows[0][:same] and a.rows[0] != b.rows[0]


def test_token_distribution():
    p = [0.5, 0.3, 0.15, 0.05]
    z = np.log(np.array([p], dtype=np.float32))
    assert distribution(z, 1.0, 0, 1.0)[0] == pytest.approx(p)
    assert (distribution(z, 1.0, 2, 1.0) > 0).sum() == 2
    assert distribution(z, 1.0, 0, 0.75)[0] == pytest.approx([0.625, 0.375, 0.0, 0.0])
    assert distribution(z, 0.1, 0, 1.0)[0, 0] > 0.99
    assert distribution(z, 1.0, 0, 1.0).dtype == np.float64
    assert np.array_equal(z, np.log(np.array([p], dtype=np.float32))), "the logits were changed"


@pytest.mark.parametrize("heat, top_k, top_p", [(1, 0, 1), (0.7, 9, 1), (1.3, 0, 0.8), (2, 7, 0.6)])
def test_draws_follow_the_distribution(heat, top_k, top_p):
    """30,000 draws against the law written out in PyTorch."""
    n = 30_000
    z = 2 * randn(1, 30)
    logits = torch.from_numpy(z).double()[0] / heat
    order = logits.argsort(descending=True)
    law = torch.zeros(30, dtype=torch.float64)
    kept = order[:top_k or 30]
    law[kept] = logits[kept].softmax(0)
    nucleus = law[order].cumsum(0) - law[order] < top_p
    law[order[~nucleus]] = 0
    law /= law.sum()
    settings = Settings(1, 1, top_k=top_k, top_p=top_p)
    drawn = unmasking.draw(np.repeat(z, n, axis=0), heat, settings, np.random.default_rng(7))
    seen = torch.bincount(torch.from_numpy(drawn), minlength=30)
    possible = law > 0
    assert not seen[~possible].any()
    want = n * law[possible]
    chi2 = float(((seen[possible] - want) ** 2 / want).sum())
    free = int(possible.sum()) - 1
    assert chi2 < free + 5 * (2 * free) ** 0.5


def test_no_draw_is_a_token_without_a_chance():
    p = np.array([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for uniform, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2 ** -53, 3)):
        assert unmasking.pick(p, np.array([uniform])).tolist() == [token]
    p = randn(500, 77) ** 2
    p[:, -1] = 0                                    # sums of all sizes, and the last draw there is
    assert (p[np.arange(500), unmasking.pick(p, np.full(500, 1 - 2 ** -53))] > 0).all()


def test_rare_tokens_keep_their_share():
    """1,000 tokens of 1e-5 each: their pooled share is 1 % within 5 % of it (D6)."""
    z = np.full((1, 1001), 1e-5, dtype=np.float32)
    z[0, 0] = 0.99
    p = np.repeat(distribution(np.log(z), 1.0, 0, 1.0), 1000, axis=0)
    generator = np.random.default_rng(0)
    draws = [unmasking.pick(p, generator.random(1000)) > 0 for _ in range(200)]
    assert np.mean(draws) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_cached_text_equals_uncached_text(model):
    """Greedy text of block_frozen equals decoding the same rule without any cache, for many prompts
    (C6).
    """
    net = small(model)
    s = Settings(20, 4, mode="block_frozen", block_size=8, temperature=0, eos_id=None)
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        prompt = torch.randint(4, 40, (1 + seed,), generator=g).tolist()
        got = write(net, prompt, s, [0]).rows[0]
        text, first = list(prompt), len(prompt) % 8 or 8
        for lo in range(0, 20, 8):  # the same rule, recomputed from the clean text at every forward
            n = min(8, 20 - lo)
            block = [40] * n
            for step in range(4):
                ids = torch.tensor([text + block])
                # the clean side of the active block is never seen
                clean = torch.tensor([text + [1] * n])
                states = net.block_states(ids, clean, 8, first)
                z = net.logits(states)[0, len(text):].detach().numpy()
                masked = np.array([i for i, t in enumerate(block) if t == 40])
                if len(masked):
                    count = reveal_count(len(masked), step, min(4, n), "linear")
                    for i in masked[unmasking.confidence(Look(z[masked]), count, s, None)]:
                        block[i] = int(z[i].argmax())
            text += block
        assert got == text[len(prompt):], seed


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_longer_than_any_training_length(model):
    net = tiny_model(model, V, shape=TINIER, n_layers=1, d_ff=16)
    out = write(net, [2], Settings(200, 2, mode="block_frozen", block_size=16, eos_id=None), [0])
    assert len(out.rows[0]) == 200 and MASK not in out.rows[0]


@pytest.mark.parametrize("sampler", NAMES)
def test_reading_a_block_beside_the_next_one_changes_no_text(sampler, monkeypatch):
    """Also where the last block is a shorter one."""
    net = small("primary")
    s = Settings(
        70,
        4,
        mode="block_frozen",
        block_size=16,
        sampler=sampler,
        temperature=0.8,
        eos_id=7,
        threshold=0.5,
    )
    prompts = [[2, 5, 6], [2, 9]] * 3
    shared = write(net, prompts, s, range(6))
    monkeypatch.delattr(type(net), "step_and_states")
    apart = write(net, prompts, s, range(6))
    assert shared.rows == apart.rows and shared.forwards == apart.forwards
    assert shared.context_passes == 2 < apart.context_passes


# ---- one token at a time: the clean stream -------------------------------------------------------

ONE = Settings(12, 9, mode="block_frozen", block_size=1, temperature=0, eos_id=None)


def rows_read(net, monkeypatch):
    """How many rows each pass through the network has."""
    counts, real = [], net.head.embed
    monkeypatch.setattr(net.head, "embed", lambda ids: counts.append(ids.numel()) or real(ids))
    return counts


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_a_token_is_one_row(model, monkeypatch):
    net = small(model)
    counts = rows_read(net, monkeypatch)
    out = write(net, [2, 5, 6, 7], ONE, [0])
    # the start, the prompt but its last token, then that one and each new one
    assert counts == [1, 3] + [1] * 12 and out.forwards == 12 and out.layer_passes == 24
    counts.clear()
    write(net, [2, 5, 6, 7], dataclasses.replace(ONE, block_size=2), [0])
    assert sum(counts) > 3 * 12, "it counts what a block of two reads"


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_its_greedy_text_is_that_of_the_clean_stream_recomputed(model):
    net = small(model, seed=4)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        text = torch.randint(4, 40, (1 + 3 * seed,), generator=g).tolist()
        [got] = write(net, text, ONE, [0]).rows
        assert len(set(got)) > 2
        for token in got:
            with torch.no_grad():
                states = net.clean_states(torch.tensor([[*text, 1]]))[0, -1]
            assert token == int(net.logits(states).argmax())
            text.append(token)


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_its_sampled_text_has_the_clean_streams_law(model):
    """All texts of two tokens, enumerated; the noisy stream's law is another one."""
    net = small(model, vocab=6)
    answers = [1, 2, 3, 4, 5]
    prompt = [2, 4, 5]
    texts = list(itertools.product(answers, repeat=2))
    x0 = torch.tensor([[*prompt, *text] for text in texts])
    laws = []
    with torch.no_grad():
        for states in (net.clean_states(x0), net.block_states(torch.full_like(x0, 6), x0, 1)):
            logp = net.logits(states).double().log_softmax(-1)
            laws.append(logp.gather(-1, x0[..., None])[:, 3:].sum((1, 2)).exp())
    assert float(laws[0].sum()) == pytest.approx(1)
    n = 3000
    s = dataclasses.replace(ONE, max_new_tokens=2, temperature=1.0, sampler="ancestral")
    found = Counter(map(tuple, write(net, prompt, s, list(range(n))).rows))
    seen = torch.tensor([found[text] for text in texts], dtype=torch.float64)
    assert seen.sum() == n
    chi2, other = (float(((seen - n * law) ** 2 / (n * law)).sum()) for law in laws)
    assert chi2 < 24 + 5 * 48 ** 0.5 < other, (chi2, other)  # 24 degrees of freedom


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_order_and_schedule_change_nothing_in_it(model, monkeypatch):
    """Rows of one batch that go their own ways: a second forward would read a token twice."""
    net = small(model)
    s = dataclasses.replace(ONE, temperature=0.9, eos_id=7)
    prompts = [[2, 5, 6], [2, 9, 11], [2, 8, 8, 8]]
    want = write(net, prompts, s, [0, 1, 2])
    assert len({tuple(row) for row in want.rows}) == 3
    for sampler in NAMES:
        for more in (dict(remask=0.5, steps=20), dict(alg_temp=1.0, reveal="cosine", steps=1)):
            if sampler in ADAPTIVE:
                more.pop("remask", None)
            changed = dataclasses.replace(s, sampler=sampler, temperature_end=0.0, **more)
            out = write(net, prompts, changed, [0, 1, 2])
            assert (out.rows, out.forwards) == (want.rows, want.forwards)


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("more", [dict(guidance_scale=3.0), dict(min_depth=1)], ids=str)
def test_guided_or_leaving_early_it_is_the_noisy_stream(model, more, monkeypatch):
    net, prompt = small(model, exits=True), [2, 5, 6]
    s = dataclasses.replace(ONE, **more)
    cache, empty = net.new_cache(1, 20), net.new_cache(1, 0)
    mask, want, last = torch.tensor([[40]]), [], prompt
    with torch.no_grad():
        for _ in range(12):
            net.step(torch.tensor([last]), cache)
            c, u = (net(mask, context)[0, 0].log_softmax(-1) for context in (cache, empty))
            z = lifted(c, u + s.guidance_scale * (c - u)).nan_to_num(-math.inf)
            last = [int(z.argmax())]
            want += last
    assert write(net, prompt, s, [0]).rows == [want]
    assert want != write(net, prompt, ONE, [0]).rows[0]


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_the_two_sides_of_guidance_are_two_forwards(model, monkeypatch):
    """In one batch where caches can stand beside each other, and the text is the same without."""
    net = small(model)
    s = Settings(20, 3, mode="block_frozen", block_size=8, guidance_scale=2.0, eos_id=None)
    prompts = [[2, 5, 6], [2, 8, 9]]
    want = write(net, prompts, s, [0, 1]).rows
    kind = type(net.new_cache(1, 0))
    assert hasattr(kind, "beside") == (model == "primary")
    if model == "backup":
        return
    with torch.no_grad():
        cache, empty = net.new_cache(2, 8), net.new_cache(2, 0)
        net.step(torch.tensor(prompts), cache)
        xt = torch.tensor([[40, 40, 9], [4, 40, 40]])
        both = net.states(xt.repeat(2, 1), cache.beside(empty))
        apart = torch.cat((net.states(xt, cache), net.states(xt, empty)))
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(apart[:2], apart[2:], atol=0.01)
    monkeypatch.delattr(kind, "beside")
    assert write(net, prompts, s, [0, 1]).rows == want


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("size", [1, 8])
def test_a_prompt_in_pieces_is_the_prompt(model, size, monkeypatch):
    """Whether PROMPT_TOKENS cuts it or half of the window does, as long as nothing leaves."""
    net = small(model)
    counts = rows_read(net, monkeypatch)
    prompt = torch.randint(4, 40, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    known = 18 if size == 1 else 19
    s = Settings(24, 3, mode="block_frozen", block_size=size, temperature=0, eos_id=None)
    want = write(net, prompt, s, [0]).rows
    assert counts[:2] == [1, known]
    for most in (1, 5, 18):
        counts.clear()
        monkeypatch.setattr(decode, "PROMPT_TOKENS", most)
        assert write(net, prompt, s, [0]).rows == want
        assert counts[1] == most
    monkeypatch.undo()
    short = dataclasses.replace(s, max_new_tokens=8)  # 27 positions: pieces of 13
    counts = rows_read(net, monkeypatch)
    assert write(net, prompt, short, [0]).rows == [want[0][:8]]
    assert counts[1:3] == [13, known - 13]


# ---- limits and ends: what a small usage error in the rules would change -------------------------

def test_the_threshold_itself_is_sure_enough():
    # 1, 0.5 and 1
    look = Look(np.array([[0.0, -np.inf], [0.0, 0.0], [0.0, -np.inf]]))
    assert sorted(unmasking.threshold(look, 1, Settings(3, 3, threshold=1.0), None).tolist()) == [
        0,
        2,
    ]
    assert len(unmasking.threshold(look, 1, Settings(3, 3, threshold=0.5), None)) == 3


def test_top_p_ends_where_the_mass_is_reached():
    """Half of the mass is in the first token, so the second, as likely as it, is left out."""
    p = distribution(np.array([[0.0, 0.0, -np.inf]]), 1.0, 0, 0.5)
    assert sorted(p[0].tolist()) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("mode", MODES)
def test_temperature_end_is_reached_at_the_last_forward(mode, monkeypatch):
    heats, real = [], unmasking.draw
    monkeypatch.setattr(
        unmasking, "draw", lambda z, heat, *rest: heats.append(heat) or real(z, heat, *rest)
    )
    generate(
        Fake("no_eos"),
        [2, 5],
        Settings(5, 5, mode=mode, block_size=5, temperature=1.0, temperature_end=0.2),
        [0],
    )
    assert heats == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("mode", MODES)
def test_the_repetition_penalty_sees_the_block_that_is_being_written(mode):
    class Fond(Fake):
        """Likes 7 best, 8 a little less, and so on, whatever stands there."""

        def scores(self, h):
            z = np.tile(2 - 0.01 * np.arange(V + 1), (len(h), 1))
            z[:, :7] = z[:, V:] = -np.inf
            return z
    s = Settings(6, 6, mode=mode, block_size=6, temperature=0, repetition_penalty=1.5)
    assert sorted(generate(Fond(), [2, 8], s, [0]).rows[0]) == [7, 9, 10, 11, 12, 13]
    assert generate(Fond(), [2, 8], dataclasses.replace(s, repetition_penalty=1.0), [0]).rows == [
        [7] * 6
    ]


def test_the_window_holds_the_latest_positions_and_no_other():
    cfg, written = small("backup").cfg, []
    cache = KVCache(cfg, 1, 5, torch.device("cpu"))
    for tokens in (3, 2, 1, 4, 5, 2):
        cache.make_room(tokens)
        new = torch.arange(len(written), len(written) + tokens).float()
        for layer in (0, 1):
            cache.write(layer, *[new.view(1, 1, -1, 1).expand(1, 2, -1, 16)] * 2)
        cache.advance(new.view(1, -1))
        written += new.tolist()
        for layer in (0, 1):
            for held in cache.context(layer):
                assert held[0, 0, :, 0].tolist() == written[-5:]
        assert cache.length == len(written) and cache.front.tolist() == [written[-1:]]


def test_seeds_of_any_size_are_seeds_of_their_own():
    s = Settings(20, 10, eos_id=None)
    seeds = (5, -5, 4, -6, 10, 11, 5 + 2**32, 5 + 2**33, 5 + 2**62, 5 + 2**64, 5 + 2**200)
    texts = [generate(RowWise(), [2], s, [seed]).rows[0] for seed in seeds]
    assert len({tuple(t) for t in texts}) == len(seeds)


# ---- a PyTorch model as an engine ----------------------------------------------------------------

@pytest.mark.parametrize("model", ["primary", "backup"])
def test_the_adapter_gives_the_logits_that_are_looked_at_and_no_gradient(model, monkeypatch):
    net = small(model)
    writer = TorchModel(net)
    counts, real = [], net.head.logits
    monkeypatch.setattr(net.head, "logits", lambda h: counts.append(h.shape[:-1]) or real(h))
    cache = writer.new_cache(2, 9)
    writer.step(np.array([[2, 5, 6], [2, 8, 9]]), cache)
    xt = np.array([[40, 7, 40], [40, 40, 9]])
    states = writer.states(xt, cache)
    rows, positions = np.array([0, 1, 1]), np.array([2, 0, 1])
    got = writer.logits(states, rows, positions)
    assert counts == [(3,)], "the head saw rows that nobody looks at"
    assert not states.requires_grad and got.dtype == np.float32
    with torch.no_grad():
        want = net(torch.from_numpy(xt), cache.cache)[rows, positions].numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert np.isneginf(got[:, [0, 40]]).all()
    cache.select(np.array([1]))
    left = writer.logits(writer.states(xt[1:], cache), np.array([0, 0]), np.array([0, 1]))
    np.testing.assert_allclose(left, got[1:], rtol=1e-5, atol=1e-5)
